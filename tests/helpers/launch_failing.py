"""Two ranks that join and write that they did; the second fails before, as often as a file says.

A case is {"how", "times", "out", "port"}: how it fails, and the two files.
"""

import json
import os
import signal
from pathlib import Path

import torch

from ee_tuning.parallel.mesh import Mesh
from helpers.ranks import become, run_ranks


def _run(rank, case):
    become(rank, 2, case["port"])
    patience = 600.0
    times = Path(case["times"])
    left = int(times.read_text())
    if rank == 1 and left:
        times.write_text(str(left - 1))
        match case["how"]:
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "raise":
                raise RuntimeError("a fault")
            case "refused":
                os.environ["MASTER_PORT"] = "1"  # where nothing listens
                patience = 1.0
    joined = Mesh(dp=2).connected(torch.device("cpu"), patience)
    with joined, Path(case["out"]).open("a") as file:
        file.write("done\n")


def main(path):
    """Every case of a file, one after the other."""
    for one in json.loads(path.read_text()):
        Path(one["out"]).touch()
        run_ranks(2, _run, one)
