"""`ee-tuning tune`: the exits of a backbone, tuned on text."""

from __future__ import annotations

import os

from ee_tuning import tune as tuning
from ee_tuning.config import TuneConfig


def tune(config: TuneConfig) -> None:
    """Tune, and say where the exits are; of several processes the first one says it.

    Raises:
        UserError, Interrupted, ProcessFailed: see `ee_tuning.tune.tune`.
    """
    tuning.tune(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"exits saved in {config.out}")
