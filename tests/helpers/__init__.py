"""What several test files need: tiny models, prompts, slow twins, and processes to start.

Imports make objects by the hundred thousand, which stay to the end: the garbage collector is off
meanwhile and, from `imported` on, does not look at them, or it would take seconds of each process.
"""

import gc

gc.disable()


def imported() -> None:
    """Say that what is to be imported is: what is made from here on is collected."""
    gc.freeze()
    gc.enable()
