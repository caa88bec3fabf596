"""What a round of decoding costs, measured with decoding's own engine and policies.

Beside rounds at full depth, so that a machine that slows down slows both alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from ee_tuning.config import Leaving
from ee_tuning.decode import Engine, Policy, Request, generate
from ee_tuning.decode.engines import engines_of
from ee_tuning.decode.settings import Full, Speculative, Threshold
from ee_tuning.devices import wait_for
from ee_tuning.exit_config import DRAFT
from ee_tuning.model import Network
from ee_tuning.suggest.predict import Costs

NUMBERS = (0, 1, 3, Leaving.max_pending)  # of tokens that leave in a round
ROUNDS, TIMES = 4, 5  # rounds that are timed together, and how often at most: the middle one counts
ALL, NONE = 0.0, 2.0  # thresholds


def measure_full(model: Network, prompt: list[int]) -> Costs:
    """Seconds of a token at full depth, and of a call that ends with its first one."""
    policy, seconds = Full(model.backbone.num_layers), []
    with _engine(model, [], prompt) as engine:
        for _ in range(TIMES):
            with _sequence(engine, policy, 0, prompt):
                seconds.append(_go(engine, policy, 0, ROUNDS))
    return Costs({(0, False): median(seconds)}, median(_call(model, prompt) for _ in range(TIMES)))


def _call(model: Network, prompt: list[int]) -> float:
    """Seconds of a call of `generate` for one token. There is more to it than to read the prompt:
    for a small model on a GPU as much as some tokens take."""
    ids = torch.tensor([prompt], device=model.backbone.device)
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1}
    wait_for(ids.device)
    start = time.perf_counter()
    generate(model, ids, mode="full", do_sample=False, **given)
    wait_for(ids.device)
    return time.perf_counter() - start


def measure(
    model: Network,
    layer: int,
    drafts: bool,
    prompt: list[int],
    full: Costs,
    seconds: float = float("inf"),
) -> Costs:
    """Seconds of rounds with the exit at `layer`.

    drafts: whether tokens that leave are verified. full: what full depth costs. seconds: to take,
    but each kind of round is timed once at least.
    """
    whole, chains = Full(model.backbone.num_layers), layer == DRAFT
    found: dict[tuple[int, bool], float] = {}
    with _engine(model, [layer], prompt, drafts) as engine, _engine(model, [], prompt) as other:

        def timed(policy: Policy, number: int) -> float:
            with _sequence(engine, policy, number, prompt), _sequence(other, whole, 0, prompt):
                begun, ratios = time.perf_counter(), list[float]()
                while not ratios or (
                    len(ratios) < TIMES
                    and time.perf_counter() - begun < seconds / (len(NUMBERS) + 1)
                ):
                    own = _go(engine, policy, number, ROUNDS)
                    ratios.append(own / _go(other, whole, 0, ROUNDS))
            return median(ratios) * full.round(0, asked=False)

        for number in NUMBERS:
            found[number, False] = timed(leaving(model, layer, number, drafts), number)
        if not chains:  # which are not asked for what is no draft
            asked = timed(leaving(model, layer, 0, drafts, asked=True), 0)
            for number in NUMBERS[:-1]:
                found[number, True] = asked + found[number, False] - found[0, False]
        captured = chains and engine.passes.compile
        alone = engine.ahead is not None and engine.ahead.rounds is not None
    return Costs(
        found, full.prompt, stops=alone or not captured, paced=not captured, asks=not chains
    )


def leaving(model: Network, layer: int, number: int, drafts: bool, asked: bool = False) -> Policy:
    """So many tokens leave at an exit, whatever it says, then one goes to the end.

    drafts: what leaves is verified. asked: the exit is asked of every token, and none leaves.
    """
    kind = Speculative if drafts else Threshold
    end, most = model.backbone.num_layers, 1 if asked else number
    if layer == DRAFT:
        return Speculative(end, max_pending=most, bar=ALL)
    return kind(end, {layer: NONE if asked else ALL}, max_pending=most)


@contextmanager
def _engine(
    model: Network, layers: list[int], prompt: list[int], drafts: bool = False
) -> Iterator[Engine]:
    """An engine for one sequence that goes on for as many rounds as are timed, warm."""
    longest = Leaving.max_pending
    # A look of the host may come some rounds late.
    capacity = len(prompt) + (longest + 1) * 2 * (ROUNDS * TIMES + 2)
    size = {"slots": 1, "capacity": capacity, "max_pending": longest, "compile": None}
    with engines_of(model).lend(model, layers, **size) as engine:
        assert isinstance(engine, Engine)
        if model.device.type == "cuda":
            engine.warm_up(drafts=drafts)
        yield engine


@contextmanager
def _sequence(engine: Engine, policy: Policy, number: int, prompt: list[int]) -> Iterator[None]:
    """Inside, there is one sequence, which has had its first rounds, of as many drafts as that."""
    request = Request(prompt, policy, engine.passes.capacity)
    engine.submit(request)
    engine.step()
    (row,) = engine.sequences.live
    row.pace, row.limit = None, policy.max_pending
    _go(engine, policy, number, 1)
    yield
    engine.cancel(request)
    engine.step()


def _go(engine: Engine, policy: Policy, number: int, rounds: int) -> float:
    """Seconds of one of so many rounds at least, each of which ends with a token that went to the
    end, after `number` that left."""
    wait_for(engine.passes.device)
    start, ends, tokens = time.perf_counter(), 0, 0
    while ends < rounds:
        events = engine.step()
        assert events, "a sequence ended before its rounds did"
        tokens += len(events)
        ends += sum(token is not None and token.exit_layer == policy.end for _, token in events)
    wait_for(engine.passes.device)  # what the device is at now is as much as it was at before
    seconds = time.perf_counter() - start
    # Of drafts only those are settled that are kept; else a step may end within a round.
    return seconds / (ends if policy.verifies else tokens / (number + 1))
