"""Tuning: `loop` is the run, `step` one optimizer step, `checkpoint` how a run goes on.

`check` says which settings cannot work, `parts` makes model and data from the others.
"""

from ee_tuning.tune.loop import tune

__all__ = ["tune"]
