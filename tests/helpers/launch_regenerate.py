"""Runs of `regenerate` as several processes: `python -m helpers.launch_regenerate CASES`."""

from __future__ import annotations

import json
import sys

from ee_tuning.regenerate.config import RegenerateConfig
from ee_tuning.regenerate.run import regenerate
from helpers.ranks import become, run_ranks


def _run(rank: int, case: dict) -> None:
    become(rank, case["settings"]["dp"], case["port"])
    regenerate(RegenerateConfig(**case["settings"]))


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        for one in json.load(file):
            run_ranks(one["settings"]["dp"], _run, one)
