"""Starting the ranks of a test: ports to meet at, one process each."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import socket
import warnings

from ee_tuning.parallel.mesh import Mesh
from helpers.forks import fork

# The status of a rank that could not join the others, and of a launch to be done once more.
AGAIN = 86
# Seconds that all cases may take on a busy machine. A rank that hangs is found out sooner: the
# others wait for it no longer than their own time-out.
LONGEST = 900


def free_ports(number):
    """Ports that nothing listens on, below those the system hands out to connections.

    Nothing holds them until a rank does: each of pytest's workers draws from others.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    found = set()
    while len(found) < number:
        port = random.SystemRandom().randrange(2000 + worker, 32000, workers)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def launch(module, cases, folder, *more, seconds=LONGEST):
    """Run a module's `main` on the cases, each with a port of its own; gives what it prints.

    It is given the cases' file and `more`. Where a rank could not join the others, or a signal
    ended one, as gloo's own thread does now and then, all of it is done once more, from the folder
    as it was, with a warning that says so. What else ends a rank is a failure of the test.
    """
    before = folder.parent / f"{folder.name}.before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(folder, before)
    status, said = _launch(module, cases, folder, more, seconds)
    if status == AGAIN:
        warnings.warn(f"done once more, as a rank was lost: {said[-2000:]}", stacklevel=2)
        shutil.rmtree(folder)
        before.rename(folder)
        status, said = _launch(module, cases, folder, more, seconds)
    shutil.rmtree(before, ignore_errors=True)
    assert status == 0, said
    return said


def _launch(module, cases, folder, more, seconds):
    """Its status and what it prints, once."""
    for case, port in zip(cases, free_ports(len(cases)), strict=True):
        case["port"] = port
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    said = folder / "said"
    said.unlink(missing_ok=True)
    process = fork(said, importlib.import_module(module).main, path, *more)
    return process.wait(seconds), process.said


def run_ranks(number, run, *given, fresh=False):
    """`run(rank, *given)` as each of so many ranks, in a process of its own; waits for all.

    Once one ends with another status than 0, the others, which would wait for it, are ended, and
    this process ends: with status `AGAIN` if a signal ended it or it could not join them, else 1.

    fresh: processes that start anew, as a GPU wants it; forked ones need not import all again.
    """
    context = multiprocessing.get_context("spawn" if fresh else "fork")
    ranks = [context.Process(target=_run, args=(rank, run, given)) for rank in range(number)]
    for rank in ranks:
        rank.start()
    running = {rank.sentinel: (i, rank) for i, rank in enumerate(ranks)}
    while running:
        failed = []
        for sentinel in multiprocessing.connection.wait(list(running)):
            i, rank = running.pop(sentinel)
            rank.join()
            if rank.exitcode:
                print(f"rank {i} ended with status {rank.exitcode}", flush=True)
                failed.append(rank.exitcode)
        if failed:
            for _, other in running.values():
                other.kill()
            # Of those that ended together, one that could not join may have missed one that failed.
            raise SystemExit(AGAIN if min(failed) < 0 or set(failed) == {AGAIN} else 1)


def _run(rank, run, given):
    """`run`, but that this process ends at once where a case's ranks do not come together.

    Were it to go on to its next case, the others would wait for it in this one, and all be out of
    step from there on.
    """
    for name in ("connect", "of_one_model"):
        setattr(Mesh, name, _joined(getattr(Mesh, name)))
    run(rank, *given)


def _joined(join):
    def or_end(*args):
        try:
            return join(*args)
        except RuntimeError as error:  # as torch says it
            print(f"it could not join the others: {error}", flush=True)
            os._exit(AGAIN)

    return or_end


def become(rank, size, port):
    """Let this process look like one that torchrun has started."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
