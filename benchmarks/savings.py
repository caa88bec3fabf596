"""What each saving of time or memory does to the exits of a real, trained model.

Pre-trains a backbone with demo/pretrain.py, tunes the same exits on it with each saving, through
`ee_tuning.tune`, and compares the final held-out losses with those of bf16 and fp32 masters.

python benchmarks/savings.py --minutes 3 --out benchmarks/results/savings.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from table import losses

from ee_tuning.config import TuneConfig
from ee_tuning.devices import hardware, pick_device, versions
from ee_tuning.files import write_json
from ee_tuning.tune import tune

ROOT = Path(__file__).parent.parent
SAVINGS: dict[str, dict[str, Any]] = {
    "bf16, fp32 masters": {},
    "backbone in fp8": {"backbone_precision": "fp8"},
    "backbone and exits in fp8": {"backbone_precision": "fp8", "exit_precision": "fp8"},
    "backbone in int8 (torchao)": {"backbone_precision": "torchao-int8"},
    "backbone in 8 bits (bitsandbytes)": {"backbone_precision": "bnb-8bit"},
    "backbone in 4 bits (bitsandbytes)": {"backbone_precision": "bnb-4bit"},
    "8-bit optimizer state": {"optimizer": "adamw-8bit"},
    "8-bit state, bf16 weights": {"optimizer": "adamw-8bit", "master_weights": "bf16"},
    "all of these": {
        "backbone_precision": "fp8", "exit_precision": "fp8",
        "optimizer": "adamw-8bit", "master_weights": "bf16",
    },
}  # fmt: skip


def pretrain(model: Path, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Pre-train a backbone of about 100 M parameters into `model`, its text into `data`.

    One that is there already is kept.
    """
    command = [sys.executable, str(ROOT / "demo" / "pretrain.py"), "--out", str(model),
               "--data-out", str(data), "--minutes", str(args.minutes), "--evals", "0",
               "--hidden-size", "768", "--intermediate-size", "2048", "--heads", "12",
               "--lr", "1e-3", *args.pretrain.split()]  # fmt: skip
    if not (model / "training.json").exists():
        subprocess.run(command, check=True)
    training = json.loads((model / "training.json").read_text())
    kept = ("parameters", "layers", "tokens", "nats_per_token", "train_seconds")
    return {key: training[key] for key in kept}


def tune_with(saving: dict[str, Any], model: Path, data: Path, args: argparse.Namespace) -> dict:
    """Held-out losses by exit layer before and after, and the seconds of the whole run."""
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as out:
        common = {
            "model": str(model), "layers": args.layers, "out": out, "overwrite": True,
            "data": [str(data / "train.jsonl")], "valid_data": [str(data / "validation.jsonl")],
            "steps": args.steps, "seq_length": args.seq_length, "micro_batch_size": 8,
            "lr": 3e-4, "min_lr": 3e-5, "eval_every": 0, "save_every": 0, "eval_batches": 1000,
        }  # fmt: skip
        config = TuneConfig(**(common | saving))
        start = time.perf_counter()
        tune(config)
        seconds = time.perf_counter() - start
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    losses = [record["valid_loss"] for record in map(json.loads, lines) if "valid_loss" in record]
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "data", "valid_data")}
    del settings["model"]
    return {
        "before": losses[0],
        "after": losses[-1],
        "seconds": round(seconds, 1),
        "settings": settings,
    }


def main() -> None:
    """Pre-train, tune with each saving, write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3, help="of pre-training")
    parser.add_argument("--pretrain", default="", help="more arguments for demo/pretrain.py")
    parser.add_argument("--layers", default="4,8,12")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--only", nargs="*", help="savings by name, and the first; default: all")
    parser.add_argument("--work", type=Path, help="folder to keep the backbone in, used again")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    model, data = work / "model", work / "data"
    result: dict[str, Any] = {
        "hardware": hardware(pick_device("auto")),
        "versions": versions(),
        "backbone": pretrain(model, data, args),
        "runs": {},
    }
    first = next(iter(SAVINGS))
    for name, saving in SAVINGS.items():
        if args.only and name not in (first, *args.only):
            continue
        result["runs"][name] = tune_with(saving, model, data, args)
        if args.out:
            write_json(args.out, result)
        print(f"{name}: {result['runs'][name]['seconds']} s")
        print(losses(result["runs"]), flush=True)


if __name__ == "__main__":
    main()
