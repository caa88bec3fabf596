"""Speed of decoding over several processes, against one, on random weights of a named shape.

torchrun --nproc-per-node 2 benchmarks/decode_parallel.py --out benchmarks/results/name.json
torchrun --nproc-per-node 2 benchmarks/decode_parallel.py --shape tiny --device cpu --new-tokens 8

One prompt, batch 1: at full depth, and with half of the tokens leaving at a quarter of the depth,
exit decisions forced as in `benchmarks/decode.py`. Weights are the same in every layout; `--check`
fails where texts at full depth differ, which in half precision they may.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode import Pattern
from parallel import forget, joined
from shapes import SHAPES, build

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.costs import work
from ee_tuning.decode import Engine, Full, Policy, Request
from ee_tuning.decode.stage import Stage
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.errors import ProcessFailed
from ee_tuning.evaluate.speed import speed
from ee_tuning.files import write_json
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.tensor import split_model
from ee_tuning.stages import cut_layers

WARM = 2  # rounds, in which passes are compiled
LAYOUTS = {"one": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}  # tp, pp


def part(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> EarlyExitModel:
    """This process's part of the model."""
    exits, dtype = ExitConfig("1/4", "mlp"), pick_dtype(args.precision, device)
    empty = build(args.shape, exits, torch.device("meta"), dtype, fp8=False)
    costs = work(empty).decoding()
    stage = cut_layers(costs, mesh.pp, [], "the layers")[mesh.pp_rank]
    model = build(args.shape, exits, device, dtype, fp8=False, stage=stage)
    model.exits.to(dtype)
    split_model(model, mesh, teacher=stage.stop == model.backbone.num_layers, gather=True)
    return model.eval()


def run(
    model: EarlyExitModel, mesh: Mesh, args: argparse.Namespace, policy: Callable[[], Policy]
) -> dict[str, Any]:
    """Tokens per second from the first new token to the last, and the last round's text."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.backbone.config.vocab_size
    prompt = torch.randint(vocabulary, (args.prompt_length,), generator=draw).tolist()
    first, length = policy(), args.prompt_length + args.new_tokens
    common: dict[str, Any] = {"slots": 1, "capacity": length, "max_pending": first.max_pending}
    common["compile"] = model.backbone.device.type == "cuda" and not args.eager
    engine: Any
    if mesh.pp > 1:
        engine = Stage(model, first.exit_layers, mesh=mesh, **common)
    else:
        engine = Engine(model, first.exit_layers, **common)
    seconds = []
    for _ in range(WARM + args.rounds):
        mesh.barrier()
        times, text = [], []
        for _, token in engine.stream([Request(prompt, policy(), length)]):
            times.append(time.perf_counter())
            text.append(token.id)
        seconds.append(times[-1] - times[0])
    rate = speed(seconds[WARM:], args.new_tokens - 1)
    return {
        "tokens_per_second": {k: round(v, 1) for k, v in rate.items()},
        "warm_up_seconds": round(sum(seconds[:WARM]), 1),
        "compiled": common["compile"],
        "text": text,
    }


def measure(
    args: argparse.Namespace, mesh: Mesh, device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way to decode in one layout."""
    model = part(args, mesh, device)
    depth, early = model.backbone.num_layers, model.all_exit_layers[0]
    yield "full depth", run(model, mesh, args, lambda: Full(depth))
    half = partial(Pattern, depth, {early: 0.0}, max_pending=4)
    yield "half leave at 1/4", run(model, mesh, args, half)


def tell(name: str, way: str, row: Any, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print what was found, and write all there is so far."""
    print(name, way, json.dumps(row), flush=True)
    if args.out:
        write_json(args.out, result)


def main() -> None:
    """Every layout in turn; the main process prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--layouts", default="one,tp2,pp2", help=", ".join(LAYOUTS))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, rank = pick_device(args.device), int(os.environ.get("RANK", 0))
    found: dict[str, Any] = {}
    result = {"settings": {k: str(v) for k, v in vars(args).items() if k != "out"}}
    result |= {"hardware": hardware(device), "versions": versions(), "layouts": found}
    for number, name in enumerate(args.layouts.split(",")):
        mesh = Mesh(1, *LAYOUTS[name])
        if rank >= mesh.size:
            continue
        rows: dict[str, Any] = found.setdefault(name, {})
        try:
            with joined(mesh, device, number):
                for way, row in measure(args, mesh, device):
                    rows[way] = row
                    if rank == 0:
                        tell(name, way, row, args, result)
        except ProcessFailed as error:
            rows["error"] = str(error)
            if rank == 0:
                tell(name, "error", rows["error"], args, result)
        forget(device)
    texts = [one["full depth"]["text"] for one in found.values()] if args.check else []
    if rank == 0 and any(text != texts[0] for text in texts):
        raise SystemExit("texts at full depth differ")


if __name__ == "__main__":
    main()
