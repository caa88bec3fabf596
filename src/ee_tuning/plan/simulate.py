"""A simulator of the pipeline's schedule: what a step takes, from what its parts take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """seconds: of a step, once steps follow each other; idle: the share of it that stages wait."""

    seconds: float
    idle: float


def simulate(
    forward: Sequence[float],
    exits: Sequence[float],
    micro_batches: int,
    send: float = 0.0,
    steps: int = 8,
    together: Sequence[bool] = (),
) -> Schedule:
    """A run of `steps` steps of stages that each do `micro_batches` times forward, then exits.

    forward, exits: seconds per micro-batch and stage, optimizer included. send: seconds until the
    next stage has a hidden state. together: of each stage, whether it begins its exits once all
    micro-batches went through its layers, see `ee_tuning.costs.room`; default: none does. A
    stage begins step n + 2 when all have ended step n: losses are read together, one step late.
    """
    parts = list(zip(forward, exits, together or [False] * len(forward), strict=True))
    ends = [[0.0] * len(forward)]
    for step in range(steps):
        barrier = max(ends[step - 1]) if step > 1 else 0.0
        arrived = [0.0] * micro_batches
        ended = []
        for stage, (run, work, at_end) in enumerate(parts):
            now = max(ends[step][stage], barrier)
            for m in range(micro_batches):
                now = max(now, arrived[m]) + run
                arrived[m] = now + send
                now += 0 if at_end else work
            now += work * micro_batches if at_end else 0
            ended.append(now)
        ends.append(ended)
    # The first steps fill the pipeline.
    half = steps // 2 if steps > 1 else 0
    seconds = (max(ends[-1]) - max(ends[half])) / (steps - half)
    busy = micro_batches * (sum(forward) + sum(exits))
    return Schedule(seconds, 1 - busy / (len(forward) * seconds))
