"""Speed and memory of the tuning step that `ee-tuning tune` runs, on a model of a named shape.

python benchmarks/tune.py --shape llama2-7b --baseline --out benchmarks/results/name.json
python benchmarks/tune.py --shape smollm2-135m --layers 10,15,20 --arch layer --micro-batch-size 1
python benchmarks/tune.py --shape tiny --seq-length 64 --device cpu
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from shapes import SHAPES, build
from torch.nn import functional

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.config import TuneConfig
from ee_tuning.costs import work
from ee_tuning.devices import GIB, hardware, pick_device, pick_dtype, versions
from ee_tuning.evaluate.speed import speed
from ee_tuning.files import write_json
from ee_tuning.model import Descent
from ee_tuning.tune.optimizers import build_optimizers, clip_gradients
from ee_tuning.tune.setup import prepare
from ee_tuning.tune.step import Tuner
from ee_tuning.tune_config import FrozenPrecision


def timed(
    function: Callable[[], Any], device: torch.device, times: int, warmup: int = 1
) -> list[float]:
    """Seconds of each call after the first `warmup`."""
    seconds = []
    for i in range(warmup + times):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


def peak(device: torch.device) -> float | None:
    """Largest memory that torch has allocated on the device since the last call, in GiB."""
    if device.type != "cuda":
        return None
    found = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return round(found, 2)


def ceiling(device: torch.device) -> float:
    """TFLOP/s of one large bf16 matrix product here."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return tflops(lambda: a @ b, n, device)


def tflops(product: Callable[[], Any], n: int, device: torch.device) -> float:
    """TFLOP/s of a product of two n × n matrices."""
    return 2 * n**3 / median(timed(product, device, 20, warmup=5)) / 1e12


def fp8_ceiling(device: torch.device) -> float:
    """TFLOP/s of one large fp8 product with row-wise scales here."""
    n = 8192
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    ones = torch.ones(n, 1, device=device)
    like = {"scale_a": ones, "scale_b": ones.T, "out_dtype": torch.bfloat16}
    return tflops(lambda: torch._scaled_mm(a, b.T, **like, use_fast_accum=True), n, device)


# What the profiler's operations are called, and what they are.
OPERATIONS = {
    "aten::mm": "bf16 products", "aten::addmm": "bf16 products", "aten::bmm": "bf16 products",
    "aten::_scaled_mm": "fp8 products", "aten::_fused_adamw_": "optimizer",
}  # fmt: skip


def seconds_on_gpu(step: Callable[[], None]) -> dict[str, float]:
    """Seconds that the GPU is at work in one step, by what it does.

    What is no product, attention or fused optimizer is generated code: norms, activations, softmax,
    rounding, sums of gradients.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    found = dict.fromkeys([*dict.fromkeys(OPERATIONS.values()), "attention"], 0.0)
    total = 0.0
    for row in profile.key_averages():
        if row.is_user_annotation:
            continue
        if row.device_type == torch.autograd.DeviceType.CUDA:
            total += row.self_device_time_total
        elif name := "attention" if "attention" in row.key else OPERATIONS.get(row.key):
            found[name] += row.self_device_time_total
    found["the rest"] = total - sum(found.values())
    return {name: round(us / 1e6, 4) for name, us in found.items()}


def measure(model: EarlyExitModel, config: TuneConfig, args: argparse.Namespace) -> dict:
    """Time of whole steps and of their parts."""
    device, dtype = model.backbone.device, model.backbone.dtype
    autocast = None if dtype == torch.float32 else dtype
    optimizers = build_optimizers(model, config)
    tuner = Tuner(model, optimizers, clip=config.clip, autocast=autocast)
    weights = dict.fromkeys(model.exit_layers, 1.0)
    shape = (config.global_batch_size, config.seq_length)
    ids = torch.randint(model.backbone.config.vocab_size, shape)
    positions = torch.arange(config.seq_length).repeat(shape[0], 1)
    rows = {"input_ids": ids, "labels": ids, "position_ids": positions}
    parts = {name: values.split(config.micro_batch_size) for name, values in rows.items()}
    batches = [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]

    def step() -> None:
        tuner.step(batches, weights)

    started = time.perf_counter()
    timed(step, device, 1, args.warmup - 1)
    warm = time.perf_counter() - started
    peak(device)
    seconds = timed(step, device, args.steps, 0)
    memory = peak(device)

    def descents() -> Iterator[Descent]:
        for batch in batches:
            given = tuner.place(batch)
            places = given["position_ids"], given.get("boundaries")
            yield model.chain.descend(given["input_ids"], *places)

    def layers() -> None:
        for descent in descents():
            descent.ahead(model.chain.stop)

    def features() -> None:
        for descent in descents():
            for layer in model.exit_layers:
                state = descent.to(layer)
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    found = tuner.predictions(layer, state)[0]
                found.backward(torch.ones_like(found))
        model.zero_grad()

    def optimizer() -> None:
        for layer, one in optimizers.items():
            for p in filter(lambda p: p.requires_grad, model.exit(layer).parameters()):
                p.grad = torch.zeros_like(p)
            clip_gradients(model.exit(layer), config.clip)
            one.step()
            one.zero_grad()

    flop = work(model, config.seq_length, config.known_tokens).flop()
    rate = speed(seconds, ids.numel())
    backbone = median(timed(layers, device, 3))
    step_parts = {
        "backbone": backbone,
        "exits below their heads": median(timed(features, device, 3)) - backbone,
        "clip and optimizer (and a fill of the gradients)": median(timed(optimizer, device, 3)),
    }
    step_parts["heads and losses (the rest)"] = median(seconds) - sum(step_parts.values())
    top = ceiling(device)
    profiled = {}
    if args.profile:
        profiled = {
            "fp8_matmul_tflops": round(fp8_ceiling(device)),
            "seconds_on_gpu": seconds_on_gpu(step),
        }
    return profiled | {
        "tokens_per_second": {k: round(v) for k, v in rate.items()},
        "peak_gib": memory,
        "warm_up_seconds": round(warm, 1),
        "flop_per_token": flop | {"sum": sum(flop.values())},
        "matmul_tflops": round(top),
        "share_of_bf16_ceiling": round(sum(flop.values()) * rate["median"] / top / 1e12, 3),
        "seconds_per_step": {k: round(v, 4) for k, v in step_parts.items()},
    }


class Baseline(torch.nn.Module):
    """Plain PyTorch and transformers: `mlp` exits with own heads, in one graph, bf16 AdamW."""

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__()
        self.model = model.model
        self.exits = model.exits.to(model.backbone.dtype)
        self.model.base_model.layers = self.model.base_model.layers[: model.exit_layers[-1]]
        self.seen: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in model.exit_layers}
        for layer, seen in self.seen.items():
            module = model.backbone.layers[layer - 1]
            module.post_attention_layernorm.register_forward_hook(
                lambda _, args, normed, seen=seen: seen.update(residual=args[0], normed=normed)
            )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The sum of the exits' losses on ids (B, T)."""
        with torch.no_grad():
            self.model.base_model(ids, use_cache=False)
        total = torch.zeros((), device=ids.device)
        for layer, seen in self.seen.items():
            exit, residual = self.exits[str(layer)], seen["residual"]
            hidden = residual + exit.mlp["mlp"](seen["normed"])
            logits = exit.head(exit.norm(hidden))[:, :-1].float().flatten(0, 1)
            total = total + functional.cross_entropy(logits, ids[:, 1:].flatten())
        return total


def measure_baseline(model: EarlyExitModel, config: TuneConfig, args: argparse.Namespace) -> dict:
    """Tokens per second and memory of `Baseline` at the same sizes."""
    device = model.backbone.device
    plain = Baseline(model)
    optimizer = torch.optim.AdamW(model.exits.parameters(), lr=1e-4, fused=device.type == "cuda")
    shape = (config.global_batch_size, config.seq_length)
    ids = torch.randint(model.backbone.config.vocab_size, shape, device=device)

    def step() -> None:
        batches = ids.split(config.micro_batch_size)
        for batch in batches:
            (plain(batch) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.exits.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    timed(step, device, 1, 0)
    peak(device)
    seconds = timed(step, device, args.steps, 0)
    rate = speed(seconds, ids.numel())
    return {
        "tokens_per_second": {k: round(v) for k, v in rate.items()},
        "peak_gib": peak(device),
    }


def main() -> None:
    """Build, measure, print and write one result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--name", default="", help="what the table calls this run")
    parser.add_argument("--layers", help="default: at every 1/8 of the depth, or after each layer")
    parser.add_argument("--arch", default="mlp")
    parser.add_argument("--head", default="own")
    parser.add_argument("--backbone-precision", default="same", choices=get_args(FrozenPrecision))
    parser.add_argument("--exit-precision", default="same")
    parser.add_argument("--exit-vocab", type=int, default=0)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--master-weights", default="fp32")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--baseline", action="store_true", help="also plain PyTorch")
    parser.add_argument("--profile", action="store_true", help="also seconds by operation, on CUDA")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    depth = SHAPES[args.shape]["num_hidden_layers"]
    every = max(1, depth // 8)
    args.layers = args.layers or ",".join(map(str, range(every, depth + 1, every)))
    device = pick_device(args.device)
    dtype = pick_dtype("auto", device)
    same = {f.name for f in dataclasses.fields(TuneConfig)} & vars(args).keys()
    config = TuneConfig(**{name: getattr(args, name) for name in same} | {"out": ""})
    exits = ExitConfig(args.layers, args.arch, head=args.head)
    fp8 = args.backbone_precision == "fp8"
    model = build(args.shape, exits, device, dtype, fp8, precision=args.backbone_precision)
    if args.exit_vocab:
        model.reduce_vocabulary(torch.arange(args.exit_vocab))
    prepare(model, config)
    result = {"settings": {k: str(v) for k, v in vars(args).items() if k != "out"}}
    result["hardware"] = hardware(device)
    result["versions"] = versions()
    result |= measure(model, config, args)
    if args.baseline:
        del model
        peak(device)
        model = build(args.shape, exits, device, dtype, False)
        result["baseline"] = measure_baseline(model, config, args)
    print(json.dumps(result, indent=1))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
