"""`ee-tuning`, but a signal strikes the last rank in the middle of its third checkpoint.

Not again after a restart, unless STRUCK_AT lists a checkpoint for that, too: "1,3" is the first
one, and after a restart the third. Its arguments are the signal's number, a file for the process id
of that rank, and the command's own.
"""

import os
import sys
from functools import partial
from pathlib import Path

from ee_tuning import tune as tuning
from ee_tuning.cli import main
from ee_tuning.parallel.mesh import restarts

number, path, *command = sys.argv[1:]
written, places = [], os.environ.get("STRUCK_AT", "3").split(",")


def strike(step):
    """When this process's part of a checkpoint is written, which is not in its place yet."""
    written.append(step)
    last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    at = int(places[restarts()]) if restarts() < len(places) else None
    if len(written) == at and last:
        Path(path).write_text(str(os.getpid()))
        os.kill(os.getpid(), int(number))


tuning.tune = partial(tuning.tune, on_checkpoint=strike)
main(command)
