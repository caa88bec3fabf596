"""A simulator of the pipeline's schedule: what a step takes, from what its parts take."""

from __future__ import annotations

import math
from collections import deque
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
    teacher: bool = False,
) -> Schedule:
    """A run of `steps` steps of stages that each do `micro_batches` times forward, then exits.

    forward, exits: seconds per micro-batch and stage, optimizer included. send: seconds until
    another stage has a hidden state. together: of each stage, whether it begins its exits once all
    micro-batches went through its layers, see `ee_tuning.costs.room`; default: none does. teacher:
    whether exits wait for what the last stage's layers give. A stage begins step n + 2 when all
    have ended step n: losses are read together, one step late.
    """
    stages, last = range(len(forward)), len(forward) - 1
    at_end = together or [False] * len(forward)
    ends = [[0.0] * len(forward)]
    for step in range(steps):
        barrier = max(ends[step - 1]) if step > 1 else 0.0
        now = [max(end, barrier) for end in ends[step]]
        ran = [[math.inf] * micro_batches for _ in stages]  # when layers had run
        left = [
            _order(
                micro_batches, micro_batches if at_end[s] else (last - s) * (teacher and work > 0)
            )
            for s, work in enumerate(exits)
        ]
        while any(left):
            for s in stages:
                while left[s]:
                    is_forward, m = left[s][0]
                    given = ran[s - 1][m] if is_forward and s else 0.0
                    if teacher and not is_forward and s < last:
                        given = ran[last][m]
                    if given == math.inf:
                        break
                    left[s].popleft()
                    start = max(now[s], given + send if given else 0.0)
                    now[s] = start + (forward[s] if is_forward else exits[s])
                    if is_forward:
                        ran[s][m] = now[s]
        ends.append(now)
    # The first steps fill the pipeline.
    half = steps // 2 if steps > 1 else 0
    seconds = (max(ends[-1]) - max(ends[half])) / (steps - half)
    busy = micro_batches * (sum(forward) + sum(exits))
    return Schedule(seconds, 1 - busy / (len(forward) * seconds))


def _order(micro_batches: int, ahead: int) -> deque[tuple[bool, int]]:
    """A stage's work in a step: (whether forward or exits, micro-batch). ahead: of its exits."""
    found: deque[tuple[bool, int]] = deque()
    for m in range(micro_batches + ahead):
        found += [(True, m)] if m < micro_batches else []
        found += [(False, m - ahead)] if m >= ahead else []
    return found
