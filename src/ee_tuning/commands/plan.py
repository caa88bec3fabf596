"""`ee-tuning plan`: memory and time of a tuning run, predicted."""

from __future__ import annotations

from ee_tuning import plan as planning
from ee_tuning.config import PlanConfig


def plan(config: PlanConfig) -> None:
    """Print what the run will take.

    Raises:
        UserError: see `ee_tuning.plan.plan`.
    """
    planning.plan(config)
