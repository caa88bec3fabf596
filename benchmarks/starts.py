"""How far exits are after no steps and after a hundred, by how they start.

python benchmarks/starts.py --model demo/model --layers 4,8,12 \\
    --out benchmarks/results/starts-demo.json
python benchmarks/starts.py --model demo/smollm2 --layers 10,15,20,25 \\
    --out benchmarks/results/starts-smollm2.json
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ee_tuning.cli import ends_in_a_line
from ee_tuning.config import TuneConfig
from ee_tuning.data import SampleOrder, micro_batches
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.exit_config import ARCHS, exit_name
from ee_tuning.files import read_json, write_json
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.tune.drafts import measure_drafts
from ee_tuning.tune.fitted import fit, tokens_to_fit
from ee_tuning.tune.optimizers import learning_rate, set_learning_rate
from ee_tuning.tune.setup import set_up

ROOT = Path(__file__).parent.parent
# Ways to start, and whether the block of a `layer` exit is a copy of the next layer, not the last.
STARTS: dict[str, tuple[str, bool]] = {
    "copied": ("copy", False),
    "random": ("random", False),
    "fitted": ("fitted", False),
    "copied, the next layer": ("copy", True),
    "fitted, the next layer": ("fitted", True),
}


def copy_next(model: Network) -> None:
    """Let the blocks of `layer` exits begin as the layers that follow them."""
    for layer in model.exit_layers:
        block: Any = model.exit(layer).block
        block.load_state_dict(model.backbone.layers[layer].state_dict())


def tune_from(init: str, following: bool, config: TuneConfig) -> dict[str, Any]:
    """Held-out losses by exit before the first step and after the last, and seconds of fitting."""
    torch.compiler.reset()
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    made = set_up(config, Mesh(), device, dtype, None, lambda _: None)
    tuner, model, size = made.tuner, made.tuner.model, config.micro_batch_size
    if following:
        copy_next(model)
    started = time.perf_counter()
    if init == "fitted":
        most = config.steps * config.global_batch_size  # no more than the run is tuned on, as tune
        rows = made.train.count(min(most, tokens_to_fit(model) // config.seq_length))
        fit(tuner, list(micro_batches(made.train, range(rows), size)))
    took = time.perf_counter() - started
    rows = made.valid.count(config.eval_batches * size)
    held_out = list(micro_batches(made.valid, range(rows), size))

    def measured() -> dict[str, Any]:
        losses = {exit_name(k): round(v, 3) for k, v in tuner.mean_losses(held_out).items()}
        if not model.draft:
            return {"loss": losses}
        shares = measure_drafts(tuner, held_out, config.draft_steps).agreement.values()
        return {"loss": losses, "drafts that agree": [round(share, 3) for share in shares]}

    before = measured()
    order = SampleOrder(made.train, config.global_batch_size, config.seed, config.steps)
    weights = dict.fromkeys(model.exit_layers, 1.0)
    for step in range(config.steps):
        for optimizer in tuner.optimizers.values():
            set_learning_rate(optimizer, learning_rate(config, step))
        tuner.step(list(micro_batches(made.train, order.indices(step), size)), weights)
    return {"before": before, "after": measured(), "seconds of fitting": round(took, 1)}


def table(result: dict[str, Any]) -> str:
    """Losses before → after, a line for each architecture and start."""
    columns = result["settings"]["layers"].split(",")
    lines = ["| exit | start | " + " | ".join(f"at {name}" for name in columns) + " |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for arch, runs in result["runs"].items():
        for start, run in runs.items():
            before, after = run["before"]["loss"], run["after"]["loss"]
            if arch == "draft":
                cells = [f"{before['draft']:.2f} → {after['draft']:.2f}"]
                cells += [""] * (len(columns) - 1)
            else:
                cells = [f"{before[name]:.2f} → {after[name]:.2f}" for name in columns]
            lines.append(f"| `{arch}` | {start} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Tune every architecture from every start; write the result after each.

    Architectures that are not asked for stay as they are in --out.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--layers", default="4,8,12")
    parser.add_argument("--archs", default=",".join(ARCHS))
    parser.add_argument("--head", default="auto")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eps", type=float, default=1e-5, help="AdamW's")
    parser.add_argument("--loss", default="kl")
    demo = ROOT / "demo" / "data"
    parser.add_argument("--data", nargs="+", default=[str(demo / "train.jsonl")])
    parser.add_argument("--valid-data", nargs="+", default=[str(demo / "validation.jsonl")])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "hardware": hardware(pick_device("auto")), "versions": versions(), "runs": {},
    }  # fmt: skip
    if args.out and args.out.exists():
        result["runs"] = read_json(args.out)["runs"]
    for arch in args.archs.split(","):
        result["runs"][arch] = {}
        for name, (init, following) in STARTS.items():
            config = TuneConfig(
                model=args.model, layers="" if arch == "draft" else args.layers, arch=arch,
                head=args.head, init=init, loss=args.loss, data=args.data,
                valid_data=args.valid_data, steps=args.steps, seq_length=args.seq_length,
                micro_batch_size=args.batch, global_batch_size=args.batch, lr=args.lr, eps=args.eps,
                min_lr=args.lr / 10, warmup=0.1, eval_batches=8, compile="off", exit_vocab=0,
            )  # fmt: skip
            if following and (arch != "layer" or not config.runs_whole):
                continue  # the next layer is in memory with the whole backbone alone
            result["runs"][arch][name] = tune_from(init, following, config)
            print(f"{arch}, {name}: {result['runs'][arch][name]}", flush=True)
        settings = asdict(config)
        kept = ("model", "head", "loss", "steps", "seq_length", "global_batch_size", "lr", "eps")
        result["settings"] = {key: settings[key] for key in kept} | {"layers": args.layers}
        if args.out:
            write_json(args.out, result)
    print(table(result))


if __name__ == "__main__":
    with ends_in_a_line():
        main()
