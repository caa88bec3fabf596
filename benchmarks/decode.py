"""Speed of decoding on a model of a named shape with random weights, exit decisions forced.

What leaves where is given by a pattern, so that speed is measured apart from quality. Drafts are an
exit's own, of a model that is made to agree with a share of them. The engine is the one that
`generate` uses.

python benchmarks/decode.py --shape llama2-7b --out benchmarks/results/decode-7b.json
python benchmarks/decode.py --shape tiny --device cpu --new-tokens 16
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from agree import let_agree, prompt_that_agrees
from shapes import SHAPES, build
from tune import timed

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.decode import (
    Engine,
    Fixed,
    Full,
    Policy,
    Request,
    Speculative,
    Threshold,
    Token,
)
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.evaluate.speed import speed
from ee_tuning.files import write_json
from ee_tuning.passes.prompts import read as read_prompts
from ee_tuning.passes.wanted import Prediction, Wanted, Window

SHARE, ACCEPTANCE = 0.5, 0.8  # of tokens that leave in the pattern; of drafts that are kept
DRAFTS = 4  # of a round, at most
TRIED = 10  # rounds at most that capture something, and so do not count


def answers(share: float) -> Iterator[bool]:
    """Of every ten, a `share` that is yes, in an order that a seed gives."""
    order = random.Random(0)
    while True:
        yield from order.sample([i < 10 * share for i in range(10)], 10)


class Pattern(Threshold):
    """A `share` of the tokens that may leave does, whatever the confidence."""

    def __init__(self, *args: Any, share: float = SHARE, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answers = answers(share)

    def leaves(self, layer: int, found: Prediction, ids: Sequence[int]) -> bool:
        """As the pattern goes on."""
        return next(self.answers)


def kept(tokens: Sequence[Token], end: int) -> dict[str, float]:
    """The share of drafts that the end was asked for and agreed with, and the tokens of a round."""
    ends = [token for token in tokens if token.exit_layer == end]
    right = len(tokens) - len(ends)
    wrong = sum(bool(token.rejected) for token in ends)
    return {
        "drafts_kept": round(right / max(1, right + wrong), 3),
        "tokens_per_round": round(len(tokens) / len(ends), 2),
    }


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, bytes read and written counted."""
    size = 2**32 if device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median(timed(lambda: target.copy_(source), device, 10, 2)) / 1e9


class Bench:
    """A model, a prompt and the measured ways to go on from it."""

    def __init__(self, model: EarlyExitModel, args: argparse.Namespace) -> None:
        self.model, self.args, self.device = model, args, model.backbone.device
        self.depth = model.backbone.num_layers
        self.compile = self.device.type == "cuda" and not args.eager
        early, size = model.exit_layers[0], (args.prompt_length, args.new_tokens)
        self.agreed = let_agree(model, early, ACCEPTANCE)
        self.prompt = prompt_that_agrees(model, early, ACCEPTANCE, *size)

    def run(self, policy: Callable[[], Policy], batch: int) -> dict:
        """Tokens per second of `batch` equal prompts, from the first new token to the last.

        The time to the first token, prompts read one after another, is told apart. Rounds in which
        something was captured do not count.
        """
        first = policy()
        length = self.args.prompt_length + self.args.new_tokens
        engine = Engine(
            self.model,
            first.exit_layers,
            slots=batch,
            capacity=length,
            max_pending=first.max_pending,
            compile=self.compile,
            drafts=first.verifies,
        )
        waits, seconds, every = [], [], list[Token]()
        begun, captured, warm, tried = time.perf_counter(), -1, 0.0, 0
        while len(seconds) < self.args.rounds:
            requests = [Request(self.prompt, policy(), length) for _ in range(batch)]
            started, times, tokens = time.perf_counter(), list[float](), list[Token]()
            for _, token in engine.stream(requests):
                times.append(time.perf_counter())
                tokens.append(token)
            warm = warm or time.perf_counter() - begun
            if len(engine.passes.graphs) > captured and tried < TRIED:
                captured, tried = len(engine.passes.graphs), tried + 1
                continue
            waits.append(times[batch - 1] - started)
            seconds.append(times[-1] - times[batch - 1])
            every += tokens[batch:]
        rate = speed(seconds, len(times) - batch)
        drafts = kept(every, first.end) if first.verifies else {}
        return {
            "tokens_per_second": {k: round(v, 1) for k, v in rate.items()},
            "ms_per_step": round(1000 * batch / rate["median"], 3),
            "first_token_ms": round(1000 * median(waits), 2),
            "first_round_seconds": round(warm, 1),
            "graphs": len(engine.passes.graphs),
            **drafts,
        }

    def parts(self, exit_layers: list[int], lengths: list[int]) -> dict[str, float]:
        """Milliseconds of one pass of each segment, by tokens in the window, batch 1."""
        length = self.args.prompt_length + self.args.new_tokens
        settings = {"slots": 1, "capacity": length, "max_pending": max(lengths)}
        passes = Engine(self.model, exit_layers, **settings, compile=self.compile).passes
        found = {}
        start = 0
        for i, stop in enumerate(segment.stop for segment in passes.segments):
            last = i == len(passes.segments) - 1
            for count in lengths if i else [1]:
                window = Window(0, count, self.prompt[:count] if not i else ())
                for after in ("nothing", "last") if not last else ("last",):
                    wanted = Wanted(after, last)
                    place = [self.args.prompt_length]

                    def one(i: int = i, window: Window = window, wanted: Wanted = wanted) -> None:
                        passes.window(i, [window], place, wanted)  # noqa: B023

                    taken = median(timed(one, self.device, 20, 3))
                    name = f"layers {start + 1}-{stop}, {count} tokens, logits: {after}"
                    found[name] = round(1000 * taken, 3)
            start = stop
        return found

    def prefill(self, length: int) -> dict[str, float]:
        """Milliseconds to read a long prompt, and transformers' for the same."""
        draw = torch.Generator().manual_seed(1)
        vocabulary = self.model.backbone.config.vocab_size
        ids = torch.randint(vocabulary, (1, length), generator=draw)
        engine = Engine(self.model, [], capacity=length + 1, compile=False)
        there, given = ids.to(self.device), {0: ids[0].tolist()}

        def ours() -> None:
            list(read_prompts(engine.passes, given, 0, Wanted("last", True), lambda i: [0]))

        @torch.inference_mode()
        def theirs() -> None:
            self.model.backbone.model(there, use_cache=True, logits_to_keep=1).logits[
                0, -1, 0
            ].item()

        pairs = [
            (timed(ours, self.device, 1)[0], timed(theirs, self.device, 1)[0])
            for _ in range(self.args.rounds)
        ]
        return {
            "prompt_tokens": length,
            "ms": round(1000 * median(a for a, _ in pairs), 2),
            "transformers_ms": round(1000 * median(b for _, b in pairs), 2),
            "share_of_transformers_speed": round(median(b / a for a, b in pairs), 3),
        }

    def transformers(self, static: bool) -> dict:
        """transformers' own greedy `generate`, dynamic or static and compiled."""
        ids = torch.tensor([self.prompt], device=self.device)
        kind = {"cache_implementation": "static"} if static else {}

        def run(number: int) -> float:
            length = {"max_new_tokens": number, "min_new_tokens": number}
            start = time.perf_counter()
            self.model.backbone.model.generate(ids, do_sample=False, **length, **kind)
            return time.perf_counter() - start

        count = self.args.new_tokens
        for _ in range(2):  # each length compiles for itself
            run(count + 1), run(1)
        seconds = [run(count + 1) - run(1) for _ in range(self.args.rounds)]
        rate = speed(seconds, count)
        return {"tokens_per_second": {k: round(v, 1) for k, v in rate.items()}}


def weight_bytes(model: EarlyExitModel, upto: int, exit: int | None) -> int:
    """Bytes of weights that one token reads: its layers, its exit or the final norm and head."""
    modules = [*model.backbone.layers[:upto]]
    modules += [model.exit(exit)] if exit else [model.backbone.norm, model.backbone.head]
    return sum(p.nbytes for module in modules for p in module.parameters())


def measure(bench: Bench, result: dict[str, Any], write: Callable[[], None]) -> None:
    """Every way to decode, one after another, into `result`."""
    depth, (early, half) = bench.depth, bench.model.exit_layers
    leaving = {early: 0.0}
    ways: dict[str, tuple[Any, ...]] = {
        "full depth": (lambda: Full(depth), 1),
        f"every token leaves at {half}": (lambda: Fixed(half), 1),
        f"every token leaves at {early}": (lambda: Fixed(early), 1),
        f"{SHARE:.0%} leave at {early}": (lambda: Pattern(depth, leaving), 1),
        f"speculative, drafts at {early}, {ACCEPTANCE:.0%} kept": (
            lambda: Speculative(depth, leaving, max_pending=DRAFTS),
            1,
        ),
        **{f"full depth, batch {n}": (lambda: Full(depth), n) for n in bench.args.batches},
        **{
            f"{SHARE:.0%} leave at {early}, batch {n}": (lambda: Pattern(depth, leaving), n)
            for n in bench.args.batches
        },
    }
    bandwidth = copy_bandwidth(bench.device)
    found: dict[str, Any] = {}
    result |= {"copy_gb_per_second": round(bandwidth), "decoding": found}
    result["end_agrees_on_random_text"] = round(bench.agreed, 3)
    for name, way in ways.items():
        if bench.args.only and not any(part in name for part in bench.args.only):
            continue
        found[name] = bench.run(*way)
        policy = way[0]()
        if way[1] == 1 and not policy.thresholds:
            read = weight_bytes(bench.model, policy.end, None if policy.final else policy.end)
            rate = read * found[name]["tokens_per_second"]["median"] / 1e9
            found[name] |= {"gb_per_second": round(rate), "of_copy": round(rate / bandwidth, 3)}
        print(name, json.dumps(found[name]), flush=True)
        write()
    result["pass_ms"] = bench.parts([early], [1, 4, 8])
    print(json.dumps(result["pass_ms"], indent=1), flush=True)
    result["prefill"] = bench.prefill(bench.args.long_prompt)
    print(result["prefill"], flush=True)
    write()
    result["transformers"] = {}
    for name, static in (("eager", False), ("static cache, compiled", True)):
        if not bench.args.only:
            result["transformers"][name] = bench.transformers(static)
            print(name, result["transformers"][name], flush=True)
            write()


def main() -> None:
    """Build, measure, print and write one result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--layers", default="1/4,1/2", help="two exits: the early one, the half")
    parser.add_argument("--arch", default="mlp")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--long-prompt", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="measure the ways with this in their names")
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    exits = ExitConfig(args.layers, args.arch)
    dtype = pick_dtype("auto", device)
    layers = range(SHAPES[args.shape]["num_hidden_layers"])
    model = build(args.shape, exits, device, dtype, fp8=False, stage=layers)
    model.exits.to(dtype)
    result = {"settings": {k: str(v) for k, v in vars(args).items() if k != "out"}}
    result |= {"hardware": hardware(device), "versions": versions()}

    def write() -> None:
        if args.out:
            write_json(args.out, result)

    measure(Bench(model.eval(), args), result, write)


if __name__ == "__main__":
    main()
