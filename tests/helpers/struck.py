"""`ee-tuning`, but a signal strikes the last rank in the middle of its third checkpoint."""

import os
from functools import partial
from pathlib import Path

from ee_tuning import tune as tuning
from ee_tuning.cli import main
from ee_tuning.parallel.mesh import restarts


def run(number, path, *command):
    """The command, its process struck by signal `number`; its id is then in the file `path`.

    Not again after a restart, unless STRUCK_AT lists a checkpoint for that, too: "1,3" is the first
    one, and after a restart the third.
    """
    written, places = [], os.environ.get("STRUCK_AT", "3").split(",")

    def strike(step):
        """When this process's part of a checkpoint is written, which is not in its place yet."""
        written.append(step)
        last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        at = int(places[restarts()]) if restarts() < len(places) else None
        if len(written) == at and last:
            Path(path).write_text(str(os.getpid()))
            os.kill(os.getpid(), number)

    tuning.tune = partial(tuning.tune, on_checkpoint=strike)
    main([str(word) for word in command])
