"""Whether `ee-tuning suggest` promises what `ee-tuning evaluate` then measures.

Lets `suggest` choose an exit, tunes it, and measures drafting with it; or does so with exits that
there are. Beside what the probe promised there is what the same reckoning says of the tuned exit.

python benchmarks/suggest.py --model demo/model --data demo/data/train.jsonl \
    --held-out demo/data/validation.jsonl --out benchmarks/results/suggest-demo.json
python benchmarks/suggest.py --exits demo/exits --layer 8 --threshold 0.5 --longest 2 \
    --held-out demo/data/validation.jsonl --out suggest.json
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from ee_tuning.commands.evaluate import evaluate
from ee_tuning.config import EvaluateConfig, TuneConfig
from ee_tuning.costs import draft_cost
from ee_tuning.data import load_packed
from ee_tuning.decode.load import load_for_decoding
from ee_tuning.devices import hardware, versions
from ee_tuning.evaluate.speed import take_prompts
from ee_tuning.files import write_json
from ee_tuning.suggest.config import SuggestConfig
from ee_tuning.suggest.predict import drafted
from ee_tuning.suggest.probes import heard, written
from ee_tuning.suggest.rounds import measure, measure_full
from ee_tuning.suggest.run import suggest
from ee_tuning.tune import tune

PROMPTS, LENGTH, NEW = 8, 32, 64


def chosen(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What `suggest` promises most of, paying or not, tuned into `folder`."""
    config = SuggestConfig(
        model=args.model, minutes=args.minutes, prompt_length=LENGTH, max_new_tokens=NEW
    )
    found = suggest(config, print)
    best = max((one for one in found.candidates if one.measured), key=lambda one: one.speedup)
    print(best)
    tune(
        TuneConfig(
            model=args.model, layers=[best.layer], arch=best.arch, head="shared", out=folder,
            data=args.data, valid_data=args.held_out, steps=args.steps, seq_length=256,
            micro_batch_size=4, global_batch_size=8, lr=3e-3, min_lr=3e-4, loss="kl",
            eval_every=0, save_every=0, overwrite=True,
        )
    )  # fmt: skip
    return {
        "layer": best.layer, "threshold": best.threshold, "longest": best.longest,
        "suggested": dataclasses.asdict(found), "probe": best.speedup,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--exits")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--longest", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        way = {"layer": args.layer, "threshold": args.threshold, "longest": args.longest}
        if not args.exits:
            args.exits = f"{folder}/exits"
            way = chosen(args, args.exits)
        config = EvaluateConfig(
            exits=args.exits, data=args.held_out, thresholds=way["threshold"], prompts=PROMPTS,
            prompt_length=LENGTH, max_new_tokens=NEW, rounds=args.rounds, seq_length=256,
            max_tokens=256, exit_layers=[way["layer"]], max_pending=way["longest"],
            out=f"{folder}/evaluated",
        )  # fmt: skip
        model, tokenizer = load_for_decoding(config)
        rows = load_packed(config.data, tokenizer, config.seq_length, config.seed, config)
        prompts = take_prompts(rows, PROMPTS, LENGTH)
        said = heard(model, written(model, prompts, NEW), LENGTH)[way["layer"]]
        full = measure_full(model, prompts[0])
        costs = measure(model, way["layer"], prompts[0], True, full)
        cost = draft_cost(model, way["layer"])
        told = drafted(said, way["threshold"], way["longest"], cost, costs)
        rounds = len(prompts) * (full.prompt + (NEW - 1) * full.round(0, asked=False))
        found = evaluate(config, Console(file=StringIO()))
    measured = found["threshold_rows"][0]["speculative"]
    result = {
        "machine": f"{hardware(model.device)}; {versions()}",
        "settings": vars(args),
        **way,
        "predicted": rounds / told.seconds,
        "measured": measured["speedup"],
        "identical_texts": measured["identical_texts"],
    }
    write_json(Path(args.out), result)
    names = ("probe", "predicted", "measured", "identical_texts")
    print({name: result[name] for name in names if name in result})


if __name__ == "__main__":
    main()
