"""What asking an exit takes, and leaving at it, and a round by its drafts, for one text.

The weights are random, so no token leaves that is asked at a threshold of nearly 1, and hardly any
draft is kept: a round is a token. At a threshold of 0 all leave that may: of so many that may be
pending and one more, all but one.

python benchmarks/rounds.py --shape smollm2-135m --out benchmarks/results/rounds-smollm2.json
python benchmarks/rounds.py --shape tiny --device cpu --new-tokens 8
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from shapes import SHAPES, build

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.decode import Engine, Full, Policy, Request, Threshold
from ee_tuning.decode.sampling import Token
from ee_tuning.decode.settings import Audited
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.exit_config import DRAFT
from ee_tuning.files import write_json

Way = Callable[[], Policy]
NEVER = 1 - 1e-9  # a threshold at which no token leaves
LONGEST = 6  # drafts of a round


class Bench:
    """A model of a shape with some exits, and an engine for one text."""

    def __init__(self, args: argparse.Namespace, exits: ExitConfig, known: int = 0) -> None:
        """known: tokens that the exits know, 0: all."""
        self.args, self.device = args, pick_device(args.device)
        self.to_count: list[tuple[dict[str, Any], Way]] = []
        dtype = pick_dtype("auto", self.device)
        self.depth = SHAPES[args.shape]["num_hidden_layers"]
        stage = range(self.depth)
        model = build(args.shape, exits, self.device, dtype, fp8=False, stage=stage)
        model.exits.to(dtype)
        if known:
            vocabulary = model.backbone.config.vocab_size
            model.reduce_vocabulary(torch.randperm(vocabulary)[:known].sort().values)
        self.model: EarlyExitModel = model.eval()
        capacity = args.prompt_length + args.new_tokens + 1
        self.engine = Engine(
            self.model, self.model.all_exit_layers, slots=1, capacity=capacity,
            max_pending=LONGEST, compile=self.device.type == "cuda",
        )  # fmt: skip

    def text(self, policy: Policy, number: int) -> tuple[float, list[Token]]:
        """Seconds of a text of so many new tokens, and those that are not drafts."""
        prompt = list(range(3, 3 + self.args.prompt_length))
        request = Request(prompt, policy, len(prompt) + number)
        start = time.perf_counter()
        tokens = [token for _, token in self.engine.stream([request])]
        return time.perf_counter() - start, [one for one in tokens if one.exit_layer != DRAFT]

    def times(self, ways: Mapping[str, Way], counted: bool = True) -> dict[str, dict[str, Any]]:
        """Milliseconds of a token of texts that are written in such ways in turn, drafts apart.

        counted: `count` gives the kernels of one, too.
        """
        number = self.args.new_tokens
        found: dict[str, list[float]] = {name: [] for name in ways}
        for policy in ways.values():
            self.text(policy(), number)
        for _, (name, policy) in product(range(self.args.rounds), ways.items()):
            (long, many), (short, few) = self.text(policy(), number), self.text(policy(), 1)
            found[name].append(1000 * (long - short) / (len(many) - len(few)))
        rows = {name: summary(taken) for name, taken in found.items()}
        if counted:
            self.to_count += [(rows[name], policy) for name, policy in ways.items()]
        return rows

    def quantile(self, layer: int, share: float) -> float:
        """The confidence that a share of tokens does not have at an exit."""
        policy = Threshold(self.depth, {layer: 0.0}, max_pending=LONGEST - 1)
        _, tokens = self.text(policy, self.args.new_tokens)
        sure = sorted(token.confidence for token in tokens if token.exit_layer == layer)
        return sure[int(share * len(sure))]

    def count(self) -> None:
        """Count kernels. Graphs were slower once the profiler had run, by a tenth: so this has
        to come behind all that is timed."""
        for row, policy in self.to_count if self.device.type == "cuda" else ():
            kernels, tokens = zip(*(self._kernels(policy, n) for n in (1, 20)), strict=True)
            row["kernels"] = round((kernels[1] - kernels[0]) / (tokens[1] - tokens[0]), 1)

    def _kernels(self, policy: Way, number: int) -> tuple[int, int]:
        """Of the device for a text, and the tokens of it that are not drafts."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            _, tokens = self.text(policy(), number)
        on_device = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == on_device for event in seen.events()), len(tokens)


def summary(taken: Sequence[float]) -> dict[str, Any]:
    """Of milliseconds."""
    some = {"ms": median(taken), "min": min(taken), "max": max(taken)}
    return {name: round(ms, 4) for name, ms in some.items()}


def asking(bench: Bench) -> dict[str, Any]:
    """A token for which none, one and two exits are asked, and what each takes, in layers."""
    depth, layers = bench.depth, bench.model.all_exit_layers
    ways: dict[str, Way] = {"0 asked": lambda: Full(depth, max_pending=LONGEST)}
    for number in range(1, len(layers) + 1):
        thresholds = dict.fromkeys(layers[:number], NEVER)
        ways[f"{number} asked"] = partial(Threshold, depth, thresholds, max_pending=LONGEST)
    rows = bench.times(ways)
    none, *_, all = (row["ms"] for row in rows.values())
    return rows | {"layers an exit takes": round((all - none) / len(layers) * depth / none, 2)}


def leaving(bench: Bench) -> dict[str, Any]:
    """A token where all leave that may, at one exit or the other, with and without the other asked;
    and where about a third leaves at each.

    layers: what a token needs. rest: milliseconds beyond their share.
    """
    depth, (first, second) = bench.depth, bench.model.all_exit_layers
    ways: dict[str, Way] = {"none asked": lambda: Full(depth, max_pending=LONGEST)}
    asked = [{first: 0.0}, {second: 0.0}, {first: 0.0, second: NEVER}, {first: NEVER, second: 0.0}]
    for thresholds, most in product(asked, (1, 2, LONGEST - 1)):
        kind = ", ".join(f"{k} {'stays' if t else 'leaves'}" for k, t in thresholds.items())
        ways[f"{kind}, {most} of {most + 1}"] = partial(
            Threshold, depth, thresholds, max_pending=most
        )
    some = {k: bench.quantile(k, share) for k, share in ((first, 2 / 3), (second, 1 / 2))}
    ways["some leave"] = partial(Threshold, depth, some, max_pending=LONGEST - 1)
    rows = bench.times(ways, counted=False)
    for name, row in rows.items():
        _, tokens = bench.text(ways[name](), bench.args.new_tokens)
        row["layers"] = round(mean(token.exit_layer for token in tokens[1:]), 2)
        row["rest"] = round(row["ms"] - rows["none asked"]["ms"] * row["layers"] / depth, 4)
    return rows


def drafting(bench: Bench) -> dict[str, Any]:
    """A round by its drafts, where the device goes on alone, and where the host looks at each."""
    depth, ahead = bench.depth, bench.engine.ahead
    found = bench.times({"no drafts": lambda: Full(depth, max_pending=LONGEST)})
    for place in ("host", "device") if ahead is not None else ("host",):
        rounds = None if ahead is None else ahead.rounds
        if ahead is not None and place == "host":
            ahead.rounds = None
        found |= bench.times({
            f"{number} drafts, by the {place}":
                partial(Audited, depth, {}, max_pending=number, bar=0.0)
            for number in range(1, LONGEST + 1)
        }, counted=place == "device")  # fmt: skip
        if ahead is not None:
            ahead.rounds = rounds
    return found


def main() -> None:
    """Measure, print and write one result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--archs", nargs="*", default=["mlp", "layer"])
    parser.add_argument("--known", type=int, default=0, help="tokens of a reduced vocabulary")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    result: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(args).items() if k != "out"}}
    result |= {"hardware": hardware(device), "versions": versions()}
    result |= {"known tokens": args.known or "all", "asking": {}, "leaving": {}}
    layers = {
        arch: Bench(args, ExitConfig("1/3,2/3", arch, head="shared"), args.known)
        for arch in args.archs
    }
    draft = Bench(args, ExitConfig("0", "draft", head="shared"), args.known)
    for arch, bench in layers.items():
        result["asking"][arch], result["leaving"][arch] = asking(bench), leaving(bench)
    result["drafting"] = drafting(draft)
    for bench in (*layers.values(), draft):
        bench.count()
    print(json.dumps(result, indent=1), flush=True)
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
