"""The best layouts of a tuning run on many GPUs, by search: the schedule simulated, memory counted.

docs/scaling.md states what is assumed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ee_tuning.config import TuneConfig
from ee_tuning.costs import Account
from ee_tuning.devices import GIB, readable
from ee_tuning.errors import UserError
from ee_tuning.model import Network
from ee_tuning.plan.check import check_model, check_parallel
from ee_tuning.plan.memory import goes_side_by_side, itemsize, memory
from ee_tuning.plan.shapes import account_of
from ee_tuning.plan.simulate import simulate
from ee_tuning.plan.time import Seconds
from ee_tuning.stages import cut_stages

NODE = 8  # GPUs
INSIDE, OUTSIDE = 300e9, 40e9  # bytes per second of a GPU within a node and between nodes: assumed
TP, PP = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Layout:
    """A layout and what is expected of it; memory: bytes of the fullest GPU."""

    dp: int
    tp: int
    pp: int
    tokens_per_second: float
    idle: float
    memory: float


def search(
    model: Network, config: TuneConfig, parts: Seconds, gpus: int, available: float
) -> list[Layout]:
    """The layouts of `gpus` GPUs that fit into `available` GiB each, the fastest first.

    Without sharding, with --sequence-parallel where tp is above 1. model: may be on the meta
    device.
    """
    account = account_of(model, config)
    found = []
    for tp in TP:
        for pp in PP:
            dp = gpus // (tp * pp)
            sizes = {"dp": dp, "tp": tp, "pp": pp, "sequence_parallel": tp > 1, "stage_layers": []}
            one = dataclasses.replace(config, **sizes)  # type: ignore[arg-type]
            if dp * tp * pp == gpus and _is_possible(model, one):
                layout = expected(account, one, parts)
                found += [layout] if layout.memory <= available * GIB else []
    return sorted(found, key=lambda layout: -layout.tokens_per_second)


def _is_possible(model: Network, config: TuneConfig) -> bool:
    """Whether tp divides what it splits, and stages and ranks have something to do."""
    try:
        check_parallel(config)
        check_model(model, config)
    except UserError:
        return False
    layers = model.backbone.num_layers if config.runs_whole else model.stage.stop
    return config.pp <= layers and config.dp <= config.global_batch_size


def expected(account: Account, config: TuneConfig, parts: Seconds) -> Layout:
    """What the layout of `config` is expected to take, by the simulated schedule."""
    tp, dp, pp = config.tp, config.dp, config.pp
    tokens = config.micro_batch_size * config.seq_length
    hidden = tokens * account.hidden * itemsize(config)
    each = math.ceil(config.global_batch_size / dp / config.micro_batch_size)
    # A ring sends everything twice, but for a process's own part.
    sum_over_tp = 2 * (tp - 1) / tp * hidden / INSIDE
    layer = max(parts.layer / tp, parts.least_layer) + 2 * sum_over_tp
    exit = parts.unsplit + (parts.exit - parts.unsplit) / tp
    exit = max(exit, parts.least_exit) + 4 * sum_over_tp
    teacher, most = config.loss != "ce", len(account.layers)
    runs = most if teacher else account.deepest
    kept = range(most if config.runs_whole else account.deepest)
    costs = [layer * (k < runs) + exit * len(account.in_stage(range(k, k + 1))) for k in kept]
    stages = cut_stages(costs, config.pp, config.stage_layers)
    numbers = [len(account.in_stage(stage)) for stage in stages]
    optimizer = parts.optimizer * _on_rank(account, tp)
    work = [n * (exit + optimizer / each) for n in numbers]
    send = hidden / tp / (INSIDE if tp * dp * pp <= NODE else OUTSIDE) if pp > 1 else 0.0
    together = [goes_side_by_side(account, config, stage) for stage in stages]
    forward = [len(range(stage.start, min(stage.stop, runs))) * layer for stage in stages]
    found = simulate(forward, work, each, send, together=together, teacher=teacher)
    seconds = found.seconds + _last_sum(account, config)
    fullest = max(sum(memory(account, config, stage).values()) for stage in stages)
    idle = 1 - (1 - found.idle) * found.seconds / seconds
    rate = config.global_batch_size * config.seq_length / seconds
    return Layout(dp, tp, pp, rate, max(0.0, idle), fullest)


def _on_rank(account: Account, tp: int) -> float:
    """The share of all exits' values that a tensor-parallel rank tunes."""
    exits = account.exits.values()
    return sum(exit.on_rank(tp) for exit in exits) / max(1, sum(e.whole.values for e in exits))


def _last_sum(account: Account, config: TuneConfig) -> float:
    """Seconds of the data-parallel sum of the last exit, in fp32; those before are hidden."""
    values = account.in_stage(range(account.deepest))[-1].on_rank(config.tp)
    inside = config.tp * config.dp <= NODE  # ranks are numbered with tp, then dp, innermost
    return 4 * values * 2 * (config.dp - 1) / config.dp / (INSIDE if inside else OUTSIDE)


def rows(layouts: Sequence[Layout]) -> list[list[str]]:
    """Cells of a table: dp × tp × pp, tokens per second, idle share, memory."""
    sizes = [f"{x.dp} × {x.tp} × {x.pp}" for x in layouts]
    found = [[f"{x.tokens_per_second:,.0f}", f"{x.idle:.1%}", readable(x.memory)] for x in layouts]
    return [[size, *cells] for size, cells in zip(sizes, found, strict=True)]
