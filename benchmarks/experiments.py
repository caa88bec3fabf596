"""The questions that the paper's experiments ask (arXiv 2402.00518, section 4), a table each.

python benchmarks/experiments.py                          # the demo's model, all of them
python benchmarks/experiments.py --only depths            # architecture × depth
python benchmarks/experiments.py --model demo/smollm2 --data own.jsonl --valid-data held.jsonl \\
    --steps 1000 --seq-length 512 --batch 16 --lr 1e-3 --out benchmarks/results/experiments-smollm2

depths        what an exit is made of, and where it sits: loss, agreement, parameters, speed
starts        copied, random and fitted exits: held-out loss as steps go by
independence  exits that are tuned together are those that are tuned alone, bit for bit
losses        what an exit is tuned on: loss and agreement

In --out, `results.json` has finished runs by their settings: what is there is not run again, and a
run that was stopped goes on from its last checkpoint. Tables go to `tables.md`, plots beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from ee_tuning.adapter import count_parameters, stored
from ee_tuning.config import EvaluateConfig, TuneConfig
from ee_tuning.data import load_packed
from ee_tuning.decode import generate
from ee_tuning.decode.load import load_for_decoding
from ee_tuning.devices import hardware, pick_device, versions
from ee_tuning.evaluate.exits import measure_exits
from ee_tuning.evaluate.speed import take_prompts
from ee_tuning.files import read_json, write_json, write_text
from ee_tuning.model import Network
from ee_tuning.share import New, shapes
from ee_tuning.tune.loop import tune

ARCHS = ("embedding", "norm", "mlp", "layer")
INITS = ("copy", "random", "fitted")
LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"loss": "ce"},
    "kl": {"loss": "kl"},
    "mixed": {"loss": "mixed"},
    "acceptance": {"loss": "acceptance"},
    "ce, dynamic weights": {"loss": "ce", "dynamic_weights": True},
}


class Runs:
    """Tuning runs, each done once: what was measured of it, by its settings."""

    def __init__(self, folder: Path, common: TuneConfig, speeds: bool) -> None:
        """common: what all runs share. speeds: measure these, too."""
        self.folder, self.common, self.speeds = folder, common, speeds
        self.path = folder / "results.json"
        self.found: dict[str, Any] = read_json(self.path) if self.path.exists() else {}

    def get(self, name: str, **settings: Any) -> dict[str, Any]:
        """What was measured of the run with these settings beside the common ones."""
        config = replace(self.common, **settings)
        key = hashlib.sha256(repr(config).encode()).hexdigest()[:16]
        if key not in self.found:
            print(f"{name} …", flush=True)
            started, out = time.perf_counter(), self.folder / "runs" / key
            tune(replace(config, out=str(out), resume=True))
            self.found[key] = {
                "name": name, "settings": settings, "seconds": time.perf_counter() - started,
                **self._measured(out, config),
            }  # fmt: skip
            write_json(self.path, self.found)
        return self.found[key] | {"folder": str(self.folder / "runs" / key)}

    def _measured(self, out: Path, config: TuneConfig) -> dict[str, Any]:
        """Of each exit: losses by step, agreement, parameters and speed with all tokens there."""
        records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        curve = [(one["step"], one["valid_loss"]) for one in records if "valid_loss" in one]
        evaluation = EvaluateConfig(
            exits=str(out), model=config.model, data=config.valid_data, seq_length=config.seq_length
        )
        model, tokenizer = load_for_decoding(evaluation)
        packed = load_packed(config.valid_data, tokenizer, config.seq_length, config.seed, config)
        rows = measure_exits(model, packed, evaluation, [])["exit_rows"]
        found = {"curve": curve, "exits": [row for row in rows if not row["final"]]}
        found["parameters"] = {str(k): n for k, n in count_parameters(out).items()}
        if self.speeds:
            prompts = take_prompts(packed, 2, min(16, config.seq_length))
            found["speed"] = {str(k): speed(model, prompts, k) for k in model.exit_layers}
            found["full_speed"] = speed(model, prompts, None)
        return found


def speed(model: Network, prompts: Sequence[Sequence[int]], layer: int | None) -> float:
    """Tokens per second where all end at an exit, or at full depth: the middle of three rounds."""
    how: dict[str, Any] = {"mode": "full"}
    if layer is not None:
        how = {"mode": "fixed", "exit_layers": [layer], "threshold": 0.0}
    rounds, new = [], 32
    for _ in range(4):
        start = time.perf_counter()
        for ids in prompts:
            inputs = torch.tensor([list(ids)], device=model.device)
            generate(model, inputs, max_new_tokens=new, min_new_tokens=new, **how)
        rounds.append(len(prompts) * new / (time.perf_counter() - start))
    return median(rounds[1:])  # the first one may compile


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def depths(runs: Runs, layers: list[int]) -> str:
    """Architecture × depth. All depths of an architecture are one run: see `independence`."""
    rows, figure = [], Figure(figsize=(5, 3.3), layout="constrained")
    axes = figure.add_subplot(xlabel="exit layer", ylabel="held-out loss (nats per token)")
    for arch in ARCHS:
        found = runs.get(f"{arch} at {layers}", arch=arch, layers=_names(layers))
        for one in found["exits"]:
            layer = str(one["layer"])
            faster = found["speed"][layer] / found["full_speed"]
            rows.append(
                [
                    f"`{arch}`", layer, f"{one['loss']:.3f}", f"{one['agreement']:.1%}",
                    f"{found['parameters'].get(layer, 0):,}", f"{faster:.2f}×",
                ]
            )  # fmt: skip
        axes.plot(layers, [one["loss"] for one in found["exits"]], "o-", label=arch)
    axes.legend(frameon=False)
    figure.savefig(runs.folder / "depths.svg")
    names = ("exit", "layer", "loss", "agrees with full depth", "parameters", "speed, all there")
    return table(names, rows)


def starts(runs: Runs, layers: list[int]) -> str:
    """Held-out losses as steps go by, of exits that begin in one way or another."""
    rows, figure = [], Figure(figsize=(5, 3.3), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="held-out loss (nats per token)")
    middle, steps = layers[len(layers) // 2], list[int]()
    for arch in ("mlp", "layer"):
        for init in INITS:
            settings: dict[str, Any] = {"arch": arch, "init": init, "layers": str(middle)}
            curve = runs.get(f"{arch}, {init}", **settings)["curve"]
            steps = [step for step, _ in curve]
            losses = [loss[str(middle)] for _, loss in curve]
            rows.append([f"`{arch}`", init, *(f"{loss:.3f}" for loss in losses)])
            axes.plot(steps, losses, "o-", label=f"{arch}, {init}")
    axes.legend(frameon=False)
    figure.savefig(runs.folder / "starts.svg")
    return table((f"exit at {middle}", "start", *(f"step {step}" for step in steps)), rows)


def independence(runs: Runs, layers: list[int]) -> str:
    """Whether exits that are tuned together have the weights of those that are tuned alone."""
    together = runs.get(f"layer at {layers}", arch="layer", layers=_names(layers))
    every, rows = stored(Path(together["folder"])), []
    for layer in layers[1::2]:
        run = runs.get(f"layer at {layer}", arch="layer", layers=str(layer))
        alone = stored(Path(run["folder"]))
        same = all(torch.equal(every[name], tensor) for name, tensor in alone.items())
        most = max(float((every[k].double() - v.double()).abs().max()) for k, v in alone.items())
        rows.append([layer, len(alone), "yes" if same else "no", f"{most:g}"])
    return table(("exit layer", "tensors", "equal bit for bit", "largest difference"), rows)


def losses(runs: Runs, layers: list[int]) -> str:
    """What an `mlp` exit in the middle is tuned on."""
    rows, middle = [], layers[len(layers) // 2]
    for name, settings in LOSSES.items():
        (one,) = runs.get(f"mlp, {name}", arch="mlp", layers=str(middle), **settings)["exits"]
        rows.append(
            [name, f"{one['loss']:.3f}", f"{one['agreement']:.1%}", f"{one['confidence']:.3f}"]
        )
    return table(
        (f"tuned on, exit at {middle}", "loss", "agrees with full depth", "mean confidence"), rows
    )


EXPERIMENTS: dict[str, Callable[[Runs, list[int]], str]] = {
    "depths": depths, "starts": starts, "independence": independence, "losses": losses,
}  # fmt: skip


def _names(layers: list[int]) -> str:
    return ",".join(map(str, layers))


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--data", nargs="*", default=["demo/data/train.jsonl"])
    parser.add_argument("--valid-data", nargs="*", default=["demo/data/validation.jsonl"])
    parser.add_argument("--layers", default="", help="default: at six depths")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--no-speeds", action="store_true", help="leave speeds out")
    parser.add_argument("--out", default="benchmarks/results/experiments-demo")
    return parser


def main() -> None:
    """Run what is not there yet, and write the tables of all that is asked for."""
    args = arguments().parse_args()
    common = TuneConfig(
        model=args.model, data=args.data, valid_data=args.valid_data, steps=args.steps,
        seq_length=args.seq_length, micro_batch_size=args.batch, global_batch_size=args.batch,
        lr=args.lr, min_lr=args.lr / 10, warmup=0.05, init="copy", eval_batches=8,
        eval_every=max(1, args.steps // 5), save_every=max(1, args.steps // 2), keep=1,
    )  # fmt: skip
    depth = shapes(New(args.model, replace(common, layers="1").exit_config())).backbone.num_layers
    every = sorted({max(1, round(depth * part / 7)) for part in range(1, 7)})
    layers = [int(one) for one in args.layers.split(",")] if args.layers else every
    runs = Runs(Path(args.out), common, not args.no_speeds)
    runs.folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in asdict(common).items() if k in ("steps", "seq_length", "lr")}
    about = f"{args.model}; {hardware(pick_device('auto'))}; {versions()}; {settings}"
    tables = [f"## {name}\n\n{EXPERIMENTS[name](runs, layers)}\n" for name in args.only]
    write_text(runs.folder / "tables.md", "\n".join([*tables, about]) + "\n")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
