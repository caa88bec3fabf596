"""Ranks of which the second crashes, as often as a file says: -m helpers.launch_crash CASES."""

import json
import os
import signal
import sys
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


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        Path(one["out"]).touch()
        run_ranks(2, _run, one)
