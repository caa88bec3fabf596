"""What exits bring to decoding on a real, trained model, and what they cost in agreement.

Pre-trains a backbone with demo/pretrain.py, tunes exits on it, and generates from held-out prompts,
one at a time: at full depth, with thresholds, and lossless with drafts, greedy and sampled.

python benchmarks/speedup.py --minutes 3 --out benchmarks/results/speedup.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from savings import pretrain

from ee_tuning import EarlyExitModel
from ee_tuning.config import TuneConfig
from ee_tuning.data import load_packed
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.evaluate.speed import take_prompts
from ee_tuning.files import write_json
from ee_tuning.loading import load_tokenizer
from ee_tuning.tune import tune


def tuned(arch: str, base: Path, data: Path, out: str, args: argparse.Namespace) -> Path:
    """A folder of exits of `arch`, tuned on the backbone's own distribution and the text."""
    if (Path(out) / "exits.safetensors").exists():
        return Path(out)
    tune(
        TuneConfig(
            model=str(base), layers=args.layers, arch=arch, out=out, overwrite=True,
            data=[str(data / "train.jsonl")], valid_data=[str(data / "validation.jsonl")],
            steps=args.steps, seq_length=args.seq_length, micro_batch_size=8, lr=1e-3, min_lr=1e-4,
            loss="mixed", kl_weight=0.8, eval_every=0, save_every=0,
        )
    )  # fmt: skip
    return Path(out)


def ways(thresholds: list[float]) -> dict[str, dict[str, Any]]:
    """Every way to decode, by name; each "full depth" is what those after it compare with."""
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 0}
    found: dict[str, dict[str, Any]] = {"full depth": {"mode": "full"}}
    found |= {f"threshold {t:g}": {"mode": "threshold", "threshold": t} for t in thresholds}
    drafts = {f"speculative {t:g}": {"mode": "speculative", "threshold": t} for t in thresholds}
    found |= drafts
    found["full depth, sampled"] = {"mode": "full", **sampled}
    return found | {f"{name}, sampled": {**way, **sampled} for name, way in drafts.items()}


def measure(
    model: EarlyExitModel,
    prompts: list[list[int]],
    args: argparse.Namespace,
    result: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """Speed, depth and agreement of every way into `result`, one group of prompts after another.

    What there is after a group is written, so that a run that is cut off leaves the groups it had.
    """
    # No text ends early; a least number of tokens would cost a look at the logits for each.
    length = {"max_new_tokens": args.new_tokens, "eos_token_id": None}
    inputs = [torch.tensor([ids], device=model.device) for ids in prompts]
    chosen = {name: {"do_sample": False} | way for name, way in ways(args.thresholds).items()}
    capacity = len(prompts[0]) + args.new_tokens
    for mode in ("full", "speculative"):  # the engines of all ways
        taken = round(model.warm_up(mode=mode, capacity=capacity), 1)
        print(f"{mode}: {taken} s to compile", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    outputs: dict[str, list[Any]] = {name: [] for name in chosen}
    begun = time.perf_counter()
    for number in range(args.groups):
        for name, way in chosen.items():
            torch.manual_seed(0)
            start = time.perf_counter()
            found = [model.generate(ids, **way, **length) for ids in inputs[number :: args.groups]]
            seconds[name].append(time.perf_counter() - start)
            outputs[name] += found
        result["ways"] = table(seconds, outputs, args.new_tokens)
        result["prompts"] = len(outputs["full depth"])
        write()
        left = (time.perf_counter() - begun) / (number + 1) * (args.groups - number - 1)
        print(f"{result['prompts']} of {len(inputs)} prompts, {left:.0f} s left", flush=True)
    for name, row in result["ways"].items():
        print(name, json.dumps(row))


def table(
    seconds: dict[str, list[float]], outputs: dict[str, list[Any]], new: int
) -> dict[str, dict[str, Any]]:
    """Figures of every way, by name. seconds: per group of prompts; outputs: of all of them."""
    rows: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        sampled = "sampled" in name
        reference = "full depth, sampled" if sampled else "full depth"
        ratios = [a / b for a, b in zip(seconds[reference], times, strict=True)]
        layers = torch.cat([out.exit_layers[0] for out in outputs[name]])
        rows[name] = {
            "tokens_per_second": round(len(layers) / sum(times), 1),
            "speedup": round(median(ratios), 3),
            "spread": [round(min(ratios), 3), round(max(ratios), 3)],
            "mean_layer": round(layers.double().mean().item(), 2),
        }
        if not sampled:  # samples are drawn in another order
            pairs = zip(outputs[name], outputs[reference], strict=True)
            same = torch.stack([(a.sequences == b.sequences)[0, -new:] for a, b in pairs])
            rows[name] |= {
                "identical_texts": int(same.all(1).sum()),
                "text_agreement": round(same.double().mean().item(), 4),
            }
    return rows


def main() -> None:
    """Pre-train, tune each architecture, measure, write what there is after each group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3, help="of pre-training")
    parser.add_argument("--pretrain", default="", help="more arguments for demo/pretrain.py")
    parser.add_argument("--layers", default="4")
    parser.add_argument("--archs", nargs="*", default=["mlp", "layer"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.8, 0.6, 0.4])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--groups", type=int, default=10, help="of prompts; the spread is theirs")
    parser.add_argument(
        "--work", type=Path, help="folder to keep backbone and exits in, used again"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    model, data = work / "model", work / "data"
    device = pick_device("auto")
    result: dict[str, Any] = {
        "hardware": hardware(device),
        "versions": versions(),
        "backbone": pretrain(model, data, args),
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("out", "work")},
        "runs": {},
    }
    tokenizer = load_tokenizer(str(model))
    # One prompt per packed row: short rows, so that there are enough of them.
    packed = load_packed([str(data / "validation.jsonl")], tokenizer, 96, 0)
    prompts = take_prompts(packed, args.prompts, 64)

    def write() -> None:
        if args.out:
            write_json(args.out, result)

    for arch in args.archs:
        folder = tuned(arch, model, data, str(work / f"{arch}-{args.layers}-{args.steps}"), args)
        settings = {"dtype": pick_dtype("auto", device), "device": str(device)}
        early_exit = EarlyExitModel.from_pretrained(str(folder), **settings).eval()
        print(arch, flush=True)
        result["runs"][arch] = {}
        measure(early_exit, prompts, args, result["runs"][arch], write)


if __name__ == "__main__":
    main()
