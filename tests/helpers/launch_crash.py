"""Ranks of which the second crashes, as often as a file says."""

import json
import os
import signal
import time
from pathlib import Path

from helpers.ranks import run_ranks


def _run(rank, case):
    crashes = Path(case["crashes"])
    left = int(crashes.read_text())
    if rank == 1 and left:
        crashes.write_text(str(left - 1))
        os.kill(os.getpid(), signal.SIGSEGV)
    if left:
        time.sleep(600)  # as one that waits for the other
    with Path(case["out"]).open("a") as file:
        file.write("done\n")


def main(path):
    """Every case of a file, one after the other."""
    for one in json.loads(path.read_text()):
        Path(one["out"]).touch()
        run_ranks(2, _run, one)
