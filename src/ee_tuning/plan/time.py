"""What a tuning step takes of a GPU's time.

A part takes its FLOP over what a GPU reaches of its datasheet's rate, but no less than its products
take to be started.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ee_tuning.config import TuneConfig
from ee_tuning.costs import Account, Work
from ee_tuning.plan.gpus import LAUNCH, Gpu, bytes_per_second, rates


@dataclass(frozen=True)
class Seconds:
    """Seconds on one GPU: of a micro-batch in a layer and in an exit, of an exit's optimizer.

    least_layer, least_exit: what is left of the first two however often matrices are split.
    unsplit: of an exit, what --tp does not divide.
    """

    layer: float
    exit: float
    optimizer: float
    least_layer: float = 0.0
    least_exit: float = 0.0
    unsplit: float = 0.0


def step_seconds(account: Account, config: TuneConfig, gpu: Gpu) -> dict[str, float]:
    """Seconds by part of one optimizer step on one GPU."""
    rate = rates(config, gpu)
    number = math.ceil(config.global_batch_size / config.micro_batch_size)
    tokens = config.global_batch_size * config.seq_length / number  # of a micro-batch

    def taken(part: Work, rate: float) -> float:
        return number * max(tokens * part.flop / rate, least_seconds(part))

    teacher = config.loss != "ce"
    layers = account.layers if teacher else account.layers[: account.reach]
    exits = account.exits.values()
    heads = [rate["shared head" if exit.shared else "tuned"] for exit in exits]
    final = [taken(account.head, rate["shared head"])] if teacher else []
    moved = 4 * (2 if config.master_weights == "bf16" else 4)  # weight and gradient, in and out
    moved += 4 if config.optimizer == "adamw-8bit" else 16
    values = sum(exit.whole.values for exit in exits)
    return {
        "backbone": sum(taken(layer, rate["frozen"]) for layer in layers),
        "exits": sum(taken(exit.below, rate["tuned"]) for exit in exits),
        "heads": sum([taken(e.head, r) for e, r in zip(exits, heads, strict=True)] + final),
        "optimizer": moved * values / bytes_per_second(gpu),
    }


def least_seconds(part: Work) -> float:
    """Seconds that a part takes of a micro-batch, however few its tokens are."""
    each = LAUNCH["tuned" if part.gradients else "frozen"]
    return each * (part.products + part.gradients)


def seconds_of_parts(account: Account, config: TuneConfig, gpu: Gpu) -> Seconds:
    """`step_seconds`, per layer and exit and micro-batch."""
    taken = step_seconds(account, config, gpu)
    number = math.ceil(config.global_batch_size / config.micro_batch_size)
    exits, rate = len(account.exits), rates(config, gpu)["tuned"]
    tokens = config.global_batch_size * config.seq_length / number
    unsplit = sum(exit.unsplit.flop for exit in account.exits.values()) * tokens / rate
    runs = len(account.layers) if config.loss != "ce" else account.deepest
    least = [
        least_seconds(exit.below) + least_seconds(exit.head) for exit in account.exits.values()
    ]
    return Seconds(
        taken["backbone"] / runs / number,
        (taken["exits"] + taken["heads"]) / exits / number,
        taken["optimizer"] / exits,
        sum(map(least_seconds, account.layers[:runs])) / runs,
        sum(least) / exits,
        unsplit / exits,
    )
