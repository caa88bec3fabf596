"""Whether `ee-tuning suggest` promises what is then measured, as `real.py` measures it.

Lets `suggest` choose an exit, tunes it, and measures drafting with it; or does so with exits that
there are. Beside what the probe promised there is, for each set of prompts, what the same reckoning
says of the tuned exit on it: `predicted`, to be compared with `measured`.

python benchmarks/suggest.py --model demo/smollm2 --data own.jsonl \\
    --out benchmarks/results/suggest-smollm2.json
python benchmarks/suggest.py --model demo/model --data demo/data/train.jsonl --sets documents \\
    --out benchmarks/results/suggest-demo.json
python benchmarks/suggest.py --exits demo/exits --layer 8 --threshold 0.5 --longest 2 \\
    --sets documents --out suggest.json
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from real import Prompts, Timed, chat_prompts, code_prompts, document_prompts, figures, timed
from ways import Own, Settings

from ee_tuning import EarlyExitModel
from ee_tuning.cli import ends_in_a_line
from ee_tuning.config import TuneConfig
from ee_tuning.costs import draft_cost
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.exit_config import DRAFT
from ee_tuning.files import read_json, write_json
from ee_tuning.loading import load_tokenizer
from ee_tuning.suggest.config import SuggestConfig
from ee_tuning.suggest.predict import drafted
from ee_tuning.suggest.probes import heard
from ee_tuning.suggest.rounds import measure, measure_full
from ee_tuning.suggest.run import suggest
from ee_tuning.tune import tune

ROUNDS = 3
SETS: dict[str, Callable[[Any], Prompts]] = {
    "code": code_prompts,
    "chat": chat_prompts,
    "documents": document_prompts,
}


def chosen(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What `suggest` promises most of, paying or not, tuned into `folder`."""
    found = suggest(SuggestConfig(model=args.model, minutes=args.minutes), print)
    best = max((one for one in found.candidates if one.measured), key=lambda one: one.speedup)
    print(best, flush=True)
    places: dict[str, Any] = {} if best.layer == DRAFT else {"layers": [best.layer]}
    tune(
        TuneConfig(
            model=args.model, arch=best.arch, head="shared", exit_vocab=best.vocab, out=folder,
            data=args.data, valid_fraction=0.01, steps=args.steps, seq_length=256,
            micro_batch_size=args.batch, global_batch_size=args.batch, lr=3e-3, min_lr=3e-4,
            loss="kl", eps=1e-8, eval_every=0, save_every=0, overwrite=True, **places,
        )
    )  # fmt: skip
    return {
        "layer": best.layer, "threshold": best.threshold, "longest": best.longest,
        "suggested": dataclasses.asdict(found), "probe": best.speedup,
    }  # fmt: skip


def measured(owns: dict[str, Own], prompts: Prompts, way: dict[str, Any]) -> dict[str, Any]:
    """What drafting brings on some prompts, as it is and as it is reckoned to be."""
    model = owns["full"].model
    calls = [torch.tensor([ids], device=model.device) for ids in prompts]
    longest = max(calls, key=lambda ids: ids.shape[1])
    for own in owns.values():
        own.warm_up(1, longest.shape[1] + own.settings.new_tokens)
        own(longest, torch.ones_like(longest))
    # In turns, so that a machine that slows down slows both alike.
    every = [
        {name: [timed(own, ids, torch.ones_like(ids), 1) for ids in calls] for name, own in pairs}
        for pairs in [owns.items()] * ROUNDS
    ]
    results: dict[str, list[Timed]] = {
        name: [
            min(tries, key=lambda one: one.best)
            for tries in zip(*(one[name] for one in every), strict=True)
        ]
        for name in owns
    }
    texts = [
        (len(ids), ids + one.answer.texts[0])
        for ids, one in zip(prompts, results["full"], strict=True)
        if len(one.answer.texts[0]) > 1
    ]
    middle = sorted(prompts, key=len)[len(prompts) // 2]
    full = measure_full(model, middle)
    costs = measure(model, way["layer"], True, middle, full)
    said = [heard(model, [ids], start)[way["layer"]][0] for start, ids in texts]
    cost = draft_cost(model, way["layer"])
    # Of each text by itself, as what is measured is: the clock goes on from one to the next.
    told = [
        drafted(said[:number], way["threshold"], way["longest"], cost, costs)
        for number in range(1, len(said) + 1)
    ]
    took = [now - before for before, now in pairwise([0.0, *(one.seconds for one in told)])]
    new = [len(ids) - start for start, ids in texts]
    whole = [full.prompt + (number - 1) * full.round(0, asked=False) for number in new]
    row = figures(results["drafting"], results["full"], model.backbone.num_layers, greedy=True)
    predicted = _each(whole, new) / _each(took, new)
    return {
        "predicted": predicted,
        "measured": row["against_full"],
        "off": predicted / row["against_full"] - 1,
        "tokens_per_round_predicted": told[-1].tokens / told[-1].ends,
        **row,
    }


def _each(seconds: list[float], tokens: list[int]) -> float:
    """Seconds a token, the mean over texts."""
    return mean(took / number for took, number in zip(seconds, tokens, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="of 256 tokens")
    parser.add_argument(
        "--exits", help="exits that there are; without --layer where those go that were suggested"
    )
    parser.add_argument("--layer", type=int)
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--longest", type=int)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--prompts", type=int, default=8, help="of each set")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    given = {name: str(value) for name, value in vars(args).items()}
    result = {"machine": f"{hardware(pick_device('auto'))}; {versions()}", "settings": given}
    with tempfile.TemporaryDirectory() as folder:
        way = {"layer": args.layer, "threshold": args.threshold, "longest": args.longest}
        exits = args.exits or f"{folder}/exits"
        if args.layer is None and Path(exits).exists():
            kept = read_json(args.out)
            way = {name: kept[name] for name in (*way, "suggested", "probe")}
        elif args.layer is None:
            way = chosen(args, exits)
        write_json(args.out, result | way)
        device = pick_device("auto")
        model = EarlyExitModel.from_pretrained(
            exits, args.model, dtype=pick_dtype("auto", device), device=device
        )
        ends = torch.tensor([model.generation_config.eos_token_id]).flatten().tolist()
        settings = Settings(args.new_tokens, frozenset(ends))
        how = {
            "mode": "speculative", "exit_layers": [way["layer"]], "threshold": way["threshold"],
            "max_pending": way["longest"],
        }  # fmt: skip
        owns = {
            "full": Own(model, {"mode": "full"}, settings),
            "drafting": Own(model, how, settings),
        }
        tokenizer = load_tokenizer(args.model or model.model.name_or_path)
        sets: dict[str, Any] = {}
        for name in args.sets:
            sets[name] = measured(owns, SETS[name](tokenizer)[: args.prompts], way)
            write_json(args.out, result | way | {"sets": sets})
            print(name, {key: sets[name][key] for key in ("predicted", "measured", "off")})


if __name__ == "__main__":
    with ends_in_a_line():
        main()
