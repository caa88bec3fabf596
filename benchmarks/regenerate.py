"""New tokens per second of texts written in waves, and what the host does for each of them.

As `ee-tuning regenerate` writes them, on a model of a named shape with random weights: every text
is as long as --new-tokens say, and sampled. With --host the passes answer at once and compute
nothing: what is left is the host's work.

python benchmarks/regenerate.py --shape smollm2-135m --slots 1024
python benchmarks/regenerate.py --shape llama2-7b --slots 128 --new-tokens 256
python benchmarks/regenerate.py --shape tiny --device cpu --slots 256 --new-tokens 128 --host
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shapes import SHAPES, build

from ee_tuning import ExitConfig
from ee_tuning.decode import Engine, Full
from ee_tuning.decode.whole import AHEAD, Text, whole_texts
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.files import write_json
from ee_tuning.grouped import use_grouped
from ee_tuning.passes.draws import Warp


def write(engine: Engine, args: argparse.Namespace, seed: int) -> float:
    """Seconds that a wave of texts takes, prompts included."""
    policy, warp = Full(engine.sequences.stops[-1]), Warp(args.temperature, top_p=args.top_p)
    size = engine.passes.backbone.config.vocab_size
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, size, (args.slots, args.prompt_tokens), generator=draw).tolist()
    length = args.prompt_tokens + args.new_tokens
    texts = deque(
        Text(ids, policy, length, seed=seed * args.slots + i, warp=warp)
        for i, ids in enumerate(prompts)
    )
    start = time.perf_counter()
    tokens = sum(len(text) for _, text in whole_texts(engine, texts, args.ahead))
    assert tokens == args.slots * args.new_tokens
    return time.perf_counter() - start


def without_computing(engine: Engine) -> None:
    """Let passes answer at once: nothing is computed, and nothing compiled."""
    passes = engine.passes

    def answer(key: tuple[Any, ...]) -> Any:
        rows, wanted = key[1], key[-1]
        if wanted.after == "nothing":
            return None
        return torch.zeros(rows, 1, 1), torch.full((2, rows, 1), 0.5)

    passes._run = answer  # type: ignore[method-assign]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The median of some waves, after one that compiles."""
    device = pick_device(args.device)
    exits, dtype = ExitConfig("1/1", "embedding", head="shared"), pick_dtype("auto", device)
    model = build(args.shape, exits, device, dtype, fp8=False)
    use_grouped(model)
    capacity = args.prompt_tokens + args.new_tokens
    compile = device.type == "cuda" or args.host  # with --host for the sizes of passes alone
    engine = Engine(model, [], slots=args.slots, capacity=capacity, compile=compile)
    if args.host:
        without_computing(engine)
    first = write(engine, args, 0)
    seconds = [write(engine, args, seed) for seed in range(1, args.rounds + 1)]
    tokens = args.slots * args.new_tokens
    return {
        "shape": args.shape,
        "settings": vars(args) | {"out": str(args.out or "")},
        "hardware": f"{hardware(device)}; {versions()}",
        "first_wave_seconds": first,
        "tokens_per_second": tokens / median(seconds),
        "all": [tokens / one for one in seconds],
        "microseconds_per_token": 1e6 * median(seconds) / tokens,
    }


def main() -> None:
    """Measure as the command line says, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--ahead", type=int, default=AHEAD)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--host", action="store_true", help="the host's work alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args)
    print(
        f"{found['tokens_per_second']:,.0f} new tokens/s, "
        f"{found['microseconds_per_token']:.2f} µs a token; first wave "
        f"{found['first_wave_seconds']:.1f} s; {found['hardware']}"
    )
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
