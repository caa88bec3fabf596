"""The tuning step of `ee-tuning tune` in several layouts of processes, against one process.

torchrun --nproc-per-node 2 benchmarks/parallel.py --shape llama2-7b --out results/name.json
torchrun --nproc-per-node 2 benchmarks/parallel.py --shape 160m --precision fp32 --check 1e-4
torchrun --nproc-per-node 2 benchmarks/parallel.py --shape tiny --seq-length 64 --device cpu
torchrun --nproc-per-node 4 benchmarks/parallel.py --shape llama2-70b --layouts pp4 \\
    --optimizer adamw-8bit --master-weights bf16

Random weights, the same in every layout, and the same random tokens at every step. Each layout
says: tokens per second, also against one process; the peak memory of every rank; losses and
gradient norms of all steps, and how far they are from one process's. One more step, with a
timeline, gives the share of time in which ranks are idle, and what the simulator says it must be
with the parts of the step as measured; for its seconds, too. On a GPU that `ee-tuning plan` knows,
what that expects of the layout stands beside. One process's figures may come from an earlier run on
the same machine: `--one FILE`. `--check` fails where losses or norms
differ by more. A layout may have a global batch of its own, ``pp2-batch8``; it is not compared. One
whose name has ``kl`` distils, and is compared with ``one-kl``; with ``fp8`` backbone and exits are
in fp8, compared with ``one-fp8``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, build
from tune import peak

from ee_tuning import EarlyExitModel
from ee_tuning.config import TuneConfig
from ee_tuning.costs import work
from ee_tuning.devices import GIB, hardware, pick_device, pick_dtype, versions
from ee_tuning.errors import ProcessFailed, UserError
from ee_tuning.evaluate.speed import speed
from ee_tuning.files import write_json
from ee_tuning.parallel.data import deal
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.pipeline import Pipeline
from ee_tuning.parallel.trace import Event, idle_share, span
from ee_tuning.plan.check import check
from ee_tuning.plan.gpus import GPUS, Gpu
from ee_tuning.plan.layouts import expected
from ee_tuning.plan.shapes import account_of
from ee_tuning.plan.simulate import simulate
from ee_tuning.plan.time import seconds_of_parts
from ee_tuning.stages import cut_stages
from ee_tuning.tune.metrics import OnTheWay
from ee_tuning.tune.optimizers import build_optimizers
from ee_tuning.tune.setup import objective, prepare
from ee_tuning.tune.step import Batch, Tuner
from ee_tuning.tune.timing import measured_costs


def settings(layout: str, args: argparse.Namespace) -> TuneConfig:
    """What ``dp2-tp2-sequence``, ``dp2-shard`` and the like mean, with the sizes of `args`."""
    sizes = {axis: int(n) for axis, n in re.findall(r"(dp|tp|pp)(\d+)", layout)}
    batch = re.search(r"batch(\d+)", layout)
    sizes |= {"global_batch_size": int(batch[1])} if batch else {}
    same = {f.name for f in dataclasses.fields(TuneConfig)} & vars(args).keys()
    given = {name: getattr(args, name) for name in same} | {"out": "", "data": ["random"]}
    flags = {"shard": "shard" in layout, "sequence_parallel": "sequence" in layout}
    balance = "measured" if "measured" in layout else "counted"
    loss: Any = {"loss": "kl", "init": "copy"} if "kl" in layout else {}
    fp8: Any = {"backbone_precision": "fp8", "exit_precision": "fp8"} if "fp8" in layout else {}
    config = TuneConfig(**given | sizes | flags | loss | fp8, balance=balance)
    check(config)
    return config


@contextmanager
def joined(mesh: Mesh, device: torch.device, number: int) -> Iterator[None]:
    """Inside, the first processes of torchrun's are the mesh; layout `number` joins anew."""
    os.environ |= {"WORLD_SIZE": str(mesh.size), "TORCHELASTIC_RESTART_COUNT": str(number)}
    with mesh.connected(device, timeout=300):
        yield


class Layout:
    """A model of random weights in a layout, and the steps it makes."""

    def __init__(self, config: TuneConfig, mesh: Mesh, device: torch.device, shape: str) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        dtype = pick_dtype(config.precision, device)
        autocast = None if dtype == torch.float32 else dtype
        self.model = prepare(build_stage(shape, config, mesh, device, dtype), config, mesh)
        self.pipeline = Pipeline(mesh, bool(self.model.exit_layers))
        optimizers = build_optimizers(self.model, config)
        common: dict[str, Any] = {"clip": config.clip, "autocast": autocast}
        common |= {"transport": self.pipeline, "objective": objective(config)}
        self.tuner = Tuner(self.model, optimizers, **common)
        self.batches = self._batches()

    def _batches(self) -> list[Batch]:
        """This rank's micro-batches of the same random tokens everywhere."""
        config, vocabulary = self.config, self.model.backbone.config.vocab_size
        size = (config.global_batch_size, config.seq_length)
        tokens = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))
        ids = torch.stack(deal(list(tokens), self.mesh))
        positions = torch.arange(config.seq_length).repeat(len(ids), 1)  # as pinned memory wants
        rows = zip(*(v.split(config.micro_batch_size) for v in (ids, positions)), strict=True)
        return [{"input_ids": i, "labels": i, "position_ids": p} for i, p in rows]

    def step(self) -> OnTheWay:
        """One step; gives this rank's terms of the exits' losses, then of their norms."""
        made = self.tuner.step(self.batches, dict.fromkeys(self.model.exit_layers, 1.0))
        mesh, none = self.mesh, torch.zeros((), device=self.device)
        losses = made.losses if mesh.tp_rank == 0 else {}
        norms = made.norms if mesh.tp_rank == mesh.dp_rank == 0 else {}
        layers = self.model.all_exit_layers
        return OnTheWay(torch.stack([f.get(k, none) for f in (losses, norms) for k in layers]))

    def steps(self, number: int) -> tuple[list[float], list[list[float]]]:
        """Seconds of the steps but first and last, and what each gave; read late, as in `tune`."""
        times, values, unread = [], [], None
        for left in range(number, -1, -1):
            last, unread = unread, self.step() if left else None
            if last:
                values.append(self.mesh.sum_on_host(last.read()))
                times.append(time.perf_counter())
        return [b - a for a, b in pairwise(times[:-1])], values

    def idle(self) -> dict[str, float]:
        """The idle share of one step by itself, and its seconds; the simulator's of its parts."""
        self.mesh.barrier()
        self.pipeline.timeline.on = True
        self.step().read()
        self.pipeline.timeline.on = False
        events = self.mesh.gather_on_host(self.pipeline.timeline.events)
        stages = events[:: self.mesh.dp * self.mesh.tp]
        each = len(self.batches)
        parts = [[total(own, what) / each for own in stages] for what in ("forward", "exit work")]
        side_by_side = len(self.tuner.waves(self.batches)) == 1
        together = self.mesh.gather_on_host(side_by_side)[:: self.mesh.dp * self.mesh.tp]
        teacher = self.config.loss != "ce"
        ideal = simulate(*parts, each, steps=1, together=together, teacher=teacher)
        first, last = span(events)
        found = {"measured": idle_share(events), "ideal": ideal.idle}
        found |= {"seconds": last - first, "simulated_seconds": ideal.seconds}
        return {name: round(value, 4) for name, value in found.items()}


def total(events: list[Event], what: str) -> float:
    """Seconds of all `what` among the events."""
    return sum(stop - start for kind, start, stop in events if kind == what)


def build_stage(
    shape: str, config: TuneConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype
) -> EarlyExitModel:
    """This process's stage of the model, the weights as they are in every layout."""
    exits, fp8 = config.exit_config(), config.backbone_precision == "fp8"
    stage = None
    if config.pp > 1:
        shapes = build(shape, exits, torch.device("meta"), dtype, False)
        if config.balance == "measured":
            costs = mesh.on_main(lambda: measured_costs(shapes, config, device, dtype))
        else:
            costs = work(shapes, config.seq_length).tuning(config.loss != "ce", config.runs_whole)
        stages = cut_stages(costs, config.pp)
        stage = stages[mesh.pp_rank]
        if mesh.is_main:
            print("layers of the stages:", *map(len, stages))
    return build(shape, exits, device, dtype, fp8, stage)


def planned(shape: str, config: TuneConfig, gpu: Gpu) -> dict[str, float]:
    """What `ee-tuning plan` expects of a layout: GiB of the fullest GPU, speed and idle share."""
    shapes = build(shape, config.exit_config(), torch.device("meta"), torch.bfloat16, False)
    account = account_of(shapes, config)
    found = expected(account, config, seconds_of_parts(account, config, gpu))
    return {
        "tokens_per_second": round(found.tokens_per_second),
        "gib": round(found.memory / GIB, 4),
        "idle": round(found.idle, 4),
    }


def measure(config: TuneConfig, mesh: Mesh, device: torch.device, args: argparse.Namespace) -> dict:
    """Speed, memory, losses and idle share of one layout."""
    started = time.perf_counter()
    layout = Layout(config, mesh, device, args.shape)
    first = layout.steps(args.warmup)[1]
    warm = time.perf_counter() - started
    peak(device)
    seconds, values = layout.steps(args.steps + 2)
    memory = mesh.gather_on_host(peak(device))
    rate = speed(seconds, config.global_batch_size * config.seq_length)
    return {
        "tokens_per_second": {k: round(v) for k, v in rate.items()},
        "seconds": [round(s, 4) for s in seconds],
        "peak_gib": memory,
        "warm_up_seconds": round(warm, 1),
        "compiled": layout.model.chain.compiled,
        "idle": layout.idle(),
        "losses": [row[: len(row) // 2] for row in first + values],
        "norms": [row[len(row) // 2 :] for row in first + values],
    }


def compare(found: dict[str, Any], one: dict[str, Any], processes: int) -> None:
    """Add what `found` is against one process."""
    rate, alone = (r["tokens_per_second"]["median"] for r in (found, one))
    found["speedup"] = round(rate / alone, 3)
    found["efficiency"] = round(rate / alone / processes, 3)
    for name in ("losses", "norms"):
        many, single = (torch.tensor(r[name]) for r in (found, one))
        found[f"{name}_differ_by"] = float((many / single - 1).abs().max())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every layout in turn; on the main process, what was found."""
    device, rank = pick_device(args.device), int(os.environ.get("RANK", 0))
    result: dict[str, Any] = {
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("out", "one")},
        "hardware": hardware(device),
        "versions": versions(),
        "layouts": {},
    }
    gpu = next((gpu for name, gpu in GPUS.items() if name in hardware(device).lower()), None)
    known = json.loads(args.one.read_text())["layouts"] if args.one else {}
    for number, name in enumerate(args.layouts.split(",")):
        config = settings(name, args)
        mesh = Mesh(config.dp, config.tp, config.pp)
        if rank >= mesh.size:
            continue
        try:
            with joined(mesh, device, number):
                found = measure(config, mesh, device, args)
            if rank == 0 and gpu and not config.shard:
                found = {"plan": planned(args.shape, config, gpu)} | found
        except (ProcessFailed, torch.OutOfMemoryError) as error:
            found = {"error": str(error)}
        alone = next((f"one-{kind}" for kind in ("kl", "fp8") if kind in name), "one")
        one = found if name == alone else (known | result["layouts"]).get(alone, {"error": ""})
        if "error" not in found and "error" not in one and "batch" not in name:
            compare(found, one, mesh.size)
        result["layouts"][name] = found
        if rank == 0:
            print(name, json.dumps(found), flush=True)
        if rank == 0 and args.out:
            write_json(args.out, result)
        forget(device)
    return result


def forget(device: torch.device) -> None:
    """Free what a layout left: compiled code, and memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    peak(device)


def main() -> None:
    """Run, and with --check judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument(
        "--layouts", default="one,dp2,tp2,pp2", help="also dp2-shard, tp2-sequence, pp2-measured, …"
    )
    parser.add_argument("--layers", default="1/8,2/8,3/8,4/8,5/8,6/8,7/8,8/8")
    parser.add_argument("--head", default="own")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--master-weights", default="fp32")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--check", type=float, help="largest relative difference of a loss")
    parser.add_argument("--one", type=Path, help="what an earlier run on this machine wrote")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    layouts = run(args)["layouts"]
    if args.check is None or int(os.environ.get("RANK", 0)):
        return
    for name, found in layouts.items():
        if "batch" in name:
            continue
        differ = [found.get(f"{values}_differ_by", math.inf) for values in ("losses", "norms")]
        if max(differ) > args.check:
            raise SystemExit(f"{name} is not within {args.check} of one process: {differ}")
    print(f"every layout gives one process's losses and norms within {args.check}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"{error}") from error
