"""What a round of decoding costs, measured with decoding's own engine.

Beside rounds at full depth, so that a machine that slows down slows both alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import median
from typing import ClassVar

from ee_tuning.config import Leaving
from ee_tuning.decode import Engine, Policy, Request
from ee_tuning.decode.engines import engines_of
from ee_tuning.decode.wanted import Prediction
from ee_tuning.exit_config import DRAFT
from ee_tuning.model import Network
from ee_tuning.suggest.predict import Costs

NUMBERS = (0, 1, 3, Leaving.max_pending)  # of tokens that leave in a round
ROUNDS, TIMES = 4, 5  # rounds that are timed together, and how often: the middle one counts


@dataclass
class Pattern(Policy):
    """So many tokens leave at an exit, then one goes to the end, whatever the exit says.

    asked: whether the exit is asked of that one, too.
    """

    number: int = 0
    asked: bool = False
    mode: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        self._places = cycle([True] * self.number + [False] * self.asked)

    def start(self) -> Policy:
        """One for each sequence, which counts for itself."""
        return replace(self)

    def leaves(self, layer: int, found: Prediction, ids: Sequence[int]) -> bool:
        """Whether it is one of those that leave."""
        return next(self._places)


class DraftedPattern(Pattern):
    """The same with drafts."""

    mode = "speculative"
    verifies = True


class ChainedPattern(DraftedPattern):
    """So many drafts of a draft exit, however sure it is: see `Policy.bar`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bar = 0.0


def measure_full(model: Network, prompt: list[int]) -> Costs:
    """Seconds of a token at full depth."""
    policy, seconds, prompts = Pattern(model.backbone.num_layers), [], []
    with _engine(model, [], prompt) as engine:
        for _ in range(TIMES):
            start = time.perf_counter()
            with _sequence(engine, policy, prompt):
                prompts.append(time.perf_counter() - start)
                seconds.append(_go(engine, policy.end, ROUNDS))
    return Costs({(0, False): median(seconds)}, median(prompts))


def measure(model: Network, layer: int, prompt: list[int], drafts: bool, full: Costs) -> Costs:
    """Seconds of rounds with the exit at `layer`.

    drafts: whether tokens that leave are verified. full: what full depth costs.
    """
    longest, end, chains = Leaving.max_pending, model.backbone.num_layers, layer == DRAFT
    kind = ChainedPattern if chains else DraftedPattern if drafts else Pattern
    kinds = [(n, asked) for n in NUMBERS for asked in (False, True) if n < longest or not asked]
    rounds, at = {}, {} if chains else {layer: 0.5}
    with _engine(model, [layer], prompt) as engine, _engine(model, [], prompt) as other:
        for number, asked in kinds:
            if chains and asked:  # it is asked for drafts alone
                continue
            policy = kind(end, at, max_pending=longest, number=number, asked=asked)
            with _sequence(engine, policy, prompt), _sequence(other, Pattern(end), prompt):
                ratios = [_go(engine, end, ROUNDS) / _go(other, end, ROUNDS) for _ in range(TIMES)]
            rounds[number, asked] = median(ratios) * full.round(0, asked=False)
    # A captured chain has as many drafts as it may: see `Engine`.
    captured = chains and engine.passes.compile
    return Costs(rounds, full.prompt, stops=not captured, asks=not chains)


@contextmanager
def _engine(model: Network, layers: list[int], prompt: list[int]) -> Iterator[Engine]:
    """An engine for one sequence that goes on for as many rounds as are timed, warm."""
    longest = Leaving.max_pending
    capacity = len(prompt) + (longest + 1) * (ROUNDS * TIMES + 2)
    size = {"slots": 1, "capacity": capacity, "max_pending": longest, "compile": None}
    with engines_of(model).lend(model, layers, **size) as engine:
        assert isinstance(engine, Engine)
        if model.device.type == "cuda":
            engine.warm_up()
        yield engine


@contextmanager
def _sequence(engine: Engine, policy: Pattern, prompt: list[int]) -> Iterator[None]:
    """Inside, there is one sequence, which has had its first round."""
    request = Request(prompt, policy, engine.passes.capacity)
    engine.submit(request)
    engine.step()
    (row,) = engine.sequences.live
    row.pace, row.limit = None, policy.number + policy.asked
    _go(engine, policy.end, 1)
    yield
    engine.cancel(request)
    engine.step()


def _go(engine: Engine, end: int, rounds: int) -> float:
    """Seconds of one of so many rounds, each of which ends with a token that went to the end."""
    start, left = time.perf_counter(), rounds
    while left > 0:
        events = engine.step()
        assert events, "a sequence ended before its rounds did"
        left -= sum(token is not None and token.exit_layer == end for _, token in events)
    return (time.perf_counter() - start) / rounds
