"""Starting the ranks of a test: ports to meet at, one process each."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from pathlib import Path


def free_ports(number):
    """Ports that nothing listens on, below those the system hands out to connections."""
    found = set()
    while len(found) < number:
        port = random.SystemRandom().randrange(2000, 10000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def launch(module, cases, folder, *more, seconds=300):
    """Run a module on the cases, each with a port of its own; gives what it prints.

    Its arguments are the cases' file and `more`.
    """
    for case, port in zip(cases, free_ports(len(cases)), strict=True):
        case["port"] = port
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    found_in = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": found_in}
    command = [sys.executable, "-m", module, path, *more]
    done = subprocess.run(command, env=env, timeout=seconds, capture_output=True, text=True)
    return done.stdout + done.stderr


def run_ranks(number, run, *given, fresh=False):
    """`run(rank, *given)` as each of so many ranks, in a process of its own; waits for all.

    fresh: processes that start anew, as a GPU wants it; forked ones need not import all again.
    """
    context = multiprocessing.get_context("spawn" if fresh else "fork")
    ranks = [context.Process(target=run, args=(rank, *given)) for rank in range(number)]
    for rank in ranks:
        rank.start()
    for i, rank in enumerate(ranks):
        rank.join()
        if rank.exitcode:
            print(f"rank {i} ended with status {rank.exitcode}")


def become(rank, size, port):
    """Let this process look like one that torchrun has started."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
