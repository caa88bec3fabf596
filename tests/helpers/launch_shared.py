"""Runs of commands whose work several processes share.

A case is {"command", "settings", "port"}; its processes are as many as `dp`, `tp` and `pp` say.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from ee_tuning.calibrate.config import CalibrateConfig
from ee_tuning.calibrate.run import calibrate
from ee_tuning.commands.evaluate import evaluate
from ee_tuning.config import EvaluateConfig
from ee_tuning.regenerate.config import RegenerateConfig
from ee_tuning.regenerate.run import regenerate
from helpers.ranks import become, run_ranks


def _ranks(settings: dict) -> int:
    return settings.get("dp", 1) * settings.get("tp", 1) * settings.get("pp", 1)


def _run(rank: int, case: dict) -> None:
    become(rank, _ranks(case["settings"]), case["port"])
    settings = case["settings"]
    match case["command"]:
        case "regenerate":
            regenerate(RegenerateConfig(**settings))
        case "calibrate":
            calibrate(CalibrateConfig(**settings))
        case "evaluate":
            evaluate(EvaluateConfig(**settings), Console(quiet=True))


def main(path: Path) -> None:
    """Every case of a file, one after the other."""
    for one in json.loads(path.read_text()):
        run_ranks(_ranks(one["settings"]), _run, one)
