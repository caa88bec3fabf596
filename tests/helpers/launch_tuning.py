"""Runs `tune` as several processes would: `main` forks the ranks once, for all cases of a file.

A case is {"size", "port", "settings", "error"}: the first `size` ranks call `tune` with
`settings`; what goes wrong on a rank is written to the file `error` + its number. A case
may `count` its traffic: see `traffic`, or let stages wait: see `ahead`; its ranks may each work in
one of its `folders`, have so many `logits` at a time, and compile with its `backend`, if any.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets
import torch
import torch.distributed as dist

from ee_tuning import losses
from ee_tuning.config import TuneConfig
from ee_tuning.parallel.pipeline import Pipeline
from ee_tuning.slices import SplitParameter
from ee_tuning.tune import tune
from ee_tuning.tune.step import Tuner
from helpers.ranks import become, run_ranks

# What python code can send through: DTensor's sums under --tp go another way.
SENDING = (
    "send", "recv", "recv_anysource", "allreduce", "reduce", "broadcast", "allgather", "gather",
    "_allgather_base", "all_gather_single", "scatter", "reduce_scatter", "_reduce_scatter_base",
    "reduce_scatter_single", "alltoall", "alltoall_base", "all_to_all_single",
)  # fmt: skip
METHODS = {name: value for name, value in vars(dist.ProcessGroup).items() if name in SENDING}
TUNING_STEP, RECORD, COMPILE = Tuner.step, Pipeline.record, torch.compile


def restore() -> None:
    """Undo what `traffic` and `ahead` did."""
    for name, original in METHODS.items():
        setattr(dist.ProcessGroup, name, original)
    Tuner.step, Pipeline.record = TUNING_STEP, RECORD


def traffic(path: str) -> None:
    """Write to `path` what this process sends and receives: [step, operation, bytes, rank].

    step: from 1, 0 outside of steps. rank: of the other process, or the number of them.
    """
    found: list[list] = []
    now = [0, 0]  # this step, 0 outside; how many there were

    def counting(name, original):
        def call(group, *args, **options):
            tensor = args[0]
            while isinstance(tensor, list):
                tensor = tensor[0]
            peer = args[1] if name in ("send", "recv") else group.size()
            found.append([now[0], name, tensor.nbytes, peer])
            Path(path).write_text(json.dumps(found))
            return original(group, *args, **options)

        return call

    def counted_step(self, *args):
        now[:] = [now[1] + 1] * 2
        result = TUNING_STEP(self, *args)
        now[0] = 0
        return result

    for name in METHODS:
        setattr(dist.ProcessGroup, name, counting(name, getattr(dist.ProcessGroup, name)))
    Tuner.step = counted_step


def is_part(p: torch.nn.Parameter) -> bool | None:
    """Whether this process read its part of a parameter alone; None where it needs all of it."""
    return p.sample is not None if isinstance(p, SplitParameter) else None


def ahead(path: Path) -> None:
    """Let the first stage begin its first exit work once the second one has a hidden state."""

    def record(self, what):
        if stepping and self.mesh.pp_rank == 1 and what == "forward":
            path.touch()
        if stepping and self.mesh.pp_rank == 0 and what == "exit work":
            deadline = time.time() + 60
            while not path.exists():
                assert time.time() < deadline, "the next stage waits for this one's exit work"
                time.sleep(0.01)
        return RECORD(self, what)

    def watched_step(self, *args):
        stepping.append(True)
        return TUNING_STEP(self, *args)

    stepping: list[bool] = []
    Pipeline.record, Tuner.step = record, watched_step


def not_compiled(function: Callable, **_) -> Callable:
    """In place of `torch.compile`, where it is not what a case is about."""
    return function


def run(rank: int, cases: list[dict]) -> None:
    """Every case that this rank has a part in."""
    torch.set_num_threads(1)
    for case in cases:
        if rank >= case["size"]:
            continue
        become(rank, case["size"], case["port"])
        restore()
        if "count" in case:
            traffic(f"{case['count']}{rank}")
        if "ahead" in case:
            ahead(Path(case["ahead"]))
        settings = dict(case["settings"])
        settings |= case.get("only_rank", {}).get(str(rank), {})
        losses.LOGITS = case["logits"]
        backend = case["backend"]
        torch.compile = partial(COMPILE, backend=backend) if backend else not_compiled
        if case["folders"]:
            os.chdir(case["folders"][rank])
        try:
            model = tune(TuneConfig(**settings))
            if "count" in case:
                named = {name: is_part(p) for name, p in model.model.named_parameters()}
                Path(f"{case['count']}{rank}.read").write_text(json.dumps(named))
        except Exception as error:
            import traceback

            text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            Path(f"{case['error']}{rank}").write_text(text)
            if dist.is_initialized():
                dist.destroy_process_group()


def main(path: Path, cache: Path) -> None:
    """Run the ranks, wait for them. cache: where datasets keeps its files."""
    cases = json.loads(path.read_text())
    datasets.config.HF_DATASETS_CACHE = cache
    run_ranks(max(case["size"] for case in cases), run, cases)
