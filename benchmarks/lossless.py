"""Whether drafting changes a text: greedy texts at full depth and with drafts, alone and beside
others.

python benchmarks/lossless.py --model demo/smollm2 --exits demo/smollm2-exits --threshold 0.1
python benchmarks/lossless.py --exits demo/exits --device cpu --dtype bf16 --new-tokens 32 --slots 8
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from ee_tuning import EarlyExitModel
from ee_tuning.cli import ends_in_a_line
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.files import write_json
from ee_tuning.loading import load_tokenizer

LONGEST = 96  # tokens of a prompt


def pieces(file: Path, tokenizer: Any, count: int) -> list[list[int]]:
    """Prompts of different lengths from a JSONL file's texts, evenly spread over them."""
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    ids = [token for text in texts for token in tokenizer(text).input_ids]
    step = (len(ids) - LONGEST) / count
    starts = [int(number * step) for number in range(count)]
    lengths = itertools.cycle(range(LONGEST // 8, LONGEST + 1))
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def written(
    model: EarlyExitModel, prompts: list[list[int]], name: str, args: argparse.Namespace, **way: Any
) -> tuple[list[list[int]], float]:
    """The new tokens of every prompt, and the seconds of all."""
    texts: list[list[int]] = [[] for _ in prompts]
    start = time.perf_counter()
    found = model.generate_batch(
        prompts, capacity=LONGEST + args.new_tokens, max_new_tokens=args.new_tokens,
        do_sample=False, max_pending=args.max_pending, **way,
    )  # fmt: skip
    shown = track(found, name, total=len(prompts), console=Console(stderr=True))
    for number, output in shown:
        texts[number] = output.sequences[0, len(prompts[number]) :].tolist()
    return texts, time.perf_counter() - start


def main() -> None:
    """Write the texts in every way, print and write how many are full depth's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exits", required=True)
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--data", type=Path, default=Path("demo/data/validation.jsonl"))
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=32, help="texts beside each other")
    parser.add_argument("--threshold", type=float, default=0.5, help="from which a draft is made")
    parser.add_argument("--max-pending", type=int, default=6, help="drafts of a round")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = EarlyExitModel.from_pretrained(args.exits, args.model, dtype=dtype, device=device)
    prompts = pieces(args.data, load_tokenizer(args.model), args.texts)
    drafts = {"mode": "speculative", "threshold": args.threshold}
    full = {"mode": "full"}
    ways = {
        "full depth, alone": full | {"slots": 1},
        f"full depth, {args.slots} at a time": full | {"slots": args.slots},
        "speculative, alone": drafts | {"slots": 1},
        f"speculative, {args.slots} at a time": drafts | {"slots": args.slots},
    }
    result: dict[str, Any] = {
        "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "hardware": hardware(device), "versions": versions(), "dtype": str(dtype), "rows": [],
    }  # fmt: skip
    base: list[list[int]] = []
    for name, way in ways.items():
        texts, seconds = written(model, prompts, name, args, **way)
        base = base or texts
        row = {
            "way": name,
            "identical": sum(a == b for a, b in zip(texts, base, strict=True)),
            "texts": len(texts),
            "tokens": sum(map(len, texts)),
            "seconds": round(seconds, 1),
        }
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            write_json(args.out, result)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    with ends_in_a_line():
        main()
