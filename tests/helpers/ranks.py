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

from helpers.forks import fork

CRASHED = 86  # the status of a launcher of which a signal ended a rank
# Seconds that all cases may take on a busy machine. A rank that hangs is found out sooner: the
# others wait for it no longer than their own time-out.
LONGEST = 900


def free_ports(number):
    """Ports that nothing listens on, below those the system hands out to connections."""
    found = set()
    while len(found) < number:
        port = random.SystemRandom().randrange(2000, 10000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def launch(module, cases, folder, *more, seconds=LONGEST):
    """Run a module's `main` on the cases, each with a port of its own; gives what it prints.

    It is given the cases' file and `more`. Where a signal ended a rank, as gloo's own thread
    does now and then, all of it is done once more, from the folder as it was, with a warning that
    says so.
    """
    before = folder.parent / f"{folder.name}.before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(folder, before)
    status, said = _launch(module, cases, folder, more, seconds)
    if status == CRASHED:
        warnings.warn(f"done once more, a rank crashed: {said[-2000:]}", stacklevel=2)
        shutil.rmtree(folder)
        before.rename(folder)
        status, said = _launch(module, cases, folder, more, seconds)
    shutil.rmtree(before, ignore_errors=True)
    assert status != CRASHED, said
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

    Once a signal ends one, the others, which would wait for it, are ended, and this process ends
    with status `CRASHED`.

    fresh: processes that start anew, as a GPU wants it; forked ones need not import all again.
    """
    context = multiprocessing.get_context("spawn" if fresh else "fork")
    ranks = [context.Process(target=run, args=(rank, *given)) for rank in range(number)]
    for rank in ranks:
        rank.start()
    running = {rank.sentinel: (i, rank) for i, rank in enumerate(ranks)}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            i, rank = running.pop(sentinel)
            rank.join()
            if rank.exitcode:
                print(f"rank {i} ended with status {rank.exitcode}", flush=True)
            if rank.exitcode < 0:
                for _, other in running.values():
                    other.kill()
                raise SystemExit(CRASHED)


def become(rank, size, port):
    """Let this process look like one that torchrun has started."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
