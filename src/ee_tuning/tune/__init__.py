"""Tuning: `loop` is the run, `step` one optimizer step, `checkpoint` how a run goes on.

`setup` makes model and data ready, `timing` measures what stages are balanced by.
"""

from ee_tuning.tune.loop import tune

__all__ = ["tune"]
