"""Runs of commands whose work several processes share.

A case is {"command", "settings", "port"}; its processes are as many as `dp`, `tp` and `pp` say.
The command `certified` lets each write the mode that calibrated thresholds come to.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from rich.console import Console

from ee_tuning.adapter import save
from ee_tuning.calibrate.config import CalibrateConfig
from ee_tuning.calibrate.run import calibrate
from ee_tuning.certificate import CALIBRATED
from ee_tuning.commands.evaluate import evaluate
from ee_tuning.config import EvaluateConfig, Leaving, SamplingConfig
from ee_tuning.decode.certified import with_certified
from ee_tuning.decode.load import load_for_decoding
from ee_tuning.errors import Notice, UserError
from ee_tuning.parallel.mesh import Mesh
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
        case "certified":
            _certified(rank, **settings)


def _certified(rank: int, exits: list[str], out: str, dp: int, tp: int, pp: int) -> None:
    mesh = Mesh(dp=dp, tp=tp, pp=pp)
    with mesh.connected(torch.device("cpu"), 60.0):
        try:
            model, _ = load_for_decoding(SamplingConfig(exits=exits[rank], device="cpu"), mesh)
        except UserError as error:
            Path(f"{out}-{rank}.json").write_text(json.dumps(["refused", [str(error)]]))
            return
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            mode = with_certified(model, Leaving(threshold=CALIBRATED)).mode
        notices = [str(one.message) for one in said if one.category is Notice]
        Path(f"{out}-{rank}.json").write_text(json.dumps([mode, notices]))
        # What is changed in memory, on all ranks alike.
        with torch.no_grad():
            for p in model.exits.parameters():
                p.mul_(2)
        refused = []
        for use in (
            lambda: with_certified(model, Leaving(threshold=CALIBRATED)).mode,
            lambda: save(model, f"{out}-{rank}"),
        ):
            try:
                refused.append(use())
            except UserError as error:
                refused.append(str(error))
        Path(f"{out}-{rank}-later.json").write_text(json.dumps(refused))


def main(path: Path) -> None:
    """Every case of a file, one after the other."""
    for one in json.loads(path.read_text()):
        run_ranks(_ranks(one["settings"]), _run, one)
