"""What asking an exit takes, and a round of drafts by how many there are, for one text.

The weights are random, so no token leaves that is asked at a threshold of nearly 1, and hardly any
draft is kept: a round is a token.

python benchmarks/rounds.py --shape smollm2-135m --out benchmarks/results/rounds-smollm2.json
python benchmarks/rounds.py --shape tiny --device cpu --new-tokens 8
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shapes import SHAPES, build

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.decode import Engine, Full, Policy, Request, Threshold
from ee_tuning.decode.settings import Audited
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.exit_config import DRAFT
from ee_tuning.files import write_json

NEVER = 1 - 1e-9  # a threshold at which no token leaves
LONGEST = 6  # drafts of a round


class Bench:
    """A model of a shape with some exits, and an engine for one text."""

    def __init__(self, args: argparse.Namespace, exits: ExitConfig, known: int = 0) -> None:
        """known: tokens that the exits know, 0: all."""
        self.args, self.device = args, pick_device(args.device)
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

    def text(self, policy: Policy, number: int) -> tuple[float, int]:
        """Seconds of a text of so many new tokens, and how many passes went to the end."""
        prompt = list(range(3, 3 + self.args.prompt_length))
        request = Request(prompt, policy, len(prompt) + number)
        start = time.perf_counter()
        tokens = [token for _, token in self.engine.stream([request])]
        return time.perf_counter() - start, sum(token.exit_layer != DRAFT for token in tokens)

    def each(self, policy: Callable[[], Policy]) -> dict[str, float]:
        """Milliseconds of a pass to the end, with what is asked and drafted before it."""
        number, found = self.args.new_tokens, []
        self.text(policy(), number)
        for _ in range(self.args.rounds):
            (long, passes), (short, first) = self.text(policy(), number), self.text(policy(), 1)
            found.append(1000 * (long - short) / (passes - first))
        return {
            "ms": round(median(found), 4),
            "min": round(min(found), 4),
            "max": round(max(found), 4),
        }

    def kernels(self, policy: Callable[[], Policy]) -> float | None:
        """Kernels of the device for such a pass; None on a CPU."""
        if self.device.type != "cuda":
            return None
        counts = []
        for number in (1, self.args.new_tokens):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                _, passes = self.text(policy(), number)
            on_device = torch.autograd.DeviceType.CUDA
            counts.append((sum(event.device_type == on_device for event in seen.events()), passes))
        (few, first), (many, passes) = counts
        return round((many - few) / (passes - first), 1)


def asking(args: argparse.Namespace, arch: str, known: int) -> dict[str, Any]:
    """A pass in which none, one and two exits are asked, and what each takes, in layers."""
    bench = Bench(args, ExitConfig("1/3,2/3", arch, head="shared"), known)
    depth, layers = bench.depth, bench.model.all_exit_layers
    found: dict[str, Any] = {"known tokens": known or "all"}
    for number in range(len(layers) + 1):
        thresholds = dict.fromkeys(layers[:number], NEVER)

        def policy(thresholds: dict[int, float] = thresholds) -> Policy:
            if not thresholds:
                return Full(depth, max_pending=LONGEST)
            return Threshold(depth, thresholds, max_pending=LONGEST)

        found[f"{number} asked"] = bench.each(policy) | {"kernels": bench.kernels(policy)}
    times = [found[f"{number} asked"]["ms"] for number in range(len(layers) + 1)]
    found["layers an exit takes"] = round(
        (times[-1] - times[0]) / len(layers) * depth / times[0], 2
    )
    return found


def drafting(args: argparse.Namespace, known: int) -> dict[str, Any]:
    """A round by its drafts, where the device goes on alone, and where the host looks at each."""
    bench = Bench(args, ExitConfig("0", "draft", head="shared"), known)
    depth, ahead = bench.depth, bench.engine.ahead
    found: dict[str, Any] = {"known tokens": known or "all"}

    def full() -> Policy:
        return Full(depth, max_pending=LONGEST)

    found["no drafts"] = bench.each(full) | {"kernels": bench.kernels(full)}
    for place in ("host", "device") if ahead is not None else ("host",):
        rounds = None if ahead is None else ahead.rounds
        if ahead is not None and place == "host":
            ahead.rounds = None
        for number in range(1, LONGEST + 1):

            def policy(number: int = number) -> Policy:
                return Audited(depth, {}, max_pending=number, bar=0.0)

            row = bench.each(policy) | {"kernels": bench.kernels(policy)}
            found[f"{number} drafts, by the {place}"] = row
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    result: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(args).items() if k != "out"}}
    result |= {"hardware": hardware(device), "versions": versions(), "asking": {}}
    for arch in args.archs:
        result["asking"][arch] = asking(args, arch, args.known)
        print(arch, json.dumps(result["asking"][arch], indent=1), flush=True)
    result["drafting"] = drafting(args, args.known)
    print(json.dumps(result["drafting"], indent=1), flush=True)
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
