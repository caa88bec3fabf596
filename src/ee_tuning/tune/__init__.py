"""Tuning: `loop` is the run, `step` one optimizer step, `checkpoint` how a run goes on."""

from ee_tuning.tune.loop import tune

__all__ = ["tune"]
