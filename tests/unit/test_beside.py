"""Prompts that are read while other texts go on: nothing of one is the other's."""

import random

import pytest
import torch
from helpers.models import DEPTH, drafting
from helpers.prompts import prompt

from ee_tuning.decode import Engine, Full, Request, Speculative
from ee_tuning.decode.ahead import Ahead
from ee_tuning.decode.drafts import FirstTokens
from ee_tuning.decode.sampling import Chooser
from ee_tuning.decode.straight import Several
from ee_tuning.decode.together import Together
from ee_tuning.exit_config import DRAFT
from ee_tuning.invariant import layers
from ee_tuning.passes.chains import Chains
from ee_tuning.passes.graphs import CHUNK, Lane, Sizes
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.straight import Feed

NEW = 26


@pytest.fixture
def apart(monkeypatch):
    """Compiled passes of a CPU that are as those of a GPU, with layers that are not compiled."""
    missing = layers._missing
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(layers, "_missing", lambda backbone, _: missing(backbone, False))


def engine_of(slots, most):
    engine = Engine(
        drafting(), [DRAFT], slots=slots, capacity=150, max_pending=most, compile=True
    )  # fmt: skip
    assert engine.passes.reads_apart
    engine.ahead = Ahead(engine.passes, engine.sequences.stops)
    engine.together = Together(engine.sequences)
    return engine


def watched(engine, monkeypatch, draw):
    """Let passes of `engine` say which slots they write to, and reading be over at some time.

    Gives how many passes of others there were while prompts were read.
    """
    beside, run, chain, init = [], Passes.run, Chains._run, FirstTokens.__init__
    find, both = Feed._find, Together._forward

    def wrote(slots, reads):
        reading = {row.slot for row in engine._reading.rows} if engine._reading else set()
        if reads:
            assert {*slots} <= {row.slot for row in reads.rows}
        else:
            assert not reading & {*slots}
            beside.append(bool(reading))

    def runs(self, key):
        wrote(self._control(key[2])[: key[1], 0].tolist(), starting if key[2] == CHUNK else None)
        return run(self, key)

    def chains(self, key):
        wrote(self.table[: key[0], 0].tolist(), None)
        return chain(self, key)

    def finds(self, forward, count, rows, *rest):
        wrote(self._control[:rows, 0].tolist(), None)
        return find(self, forward, count, rows, *rest)

    def drafts(self, rows, *rest):
        wrote(self._table[:rows, 0].tolist(), None)
        return both(self, rows, *rest)

    starting = None

    def begins(self, sequences, rows, lane):
        nonlocal starting
        starting, self.rows = self, rows
        init(self, sequences, rows, lane)
        starting = None

    monkeypatch.setattr(Passes, "run", runs)
    monkeypatch.setattr(Chains, "_run", chains)
    monkeypatch.setattr(Feed, "_find", finds)
    monkeypatch.setattr(Together, "_forward", drafts)
    monkeypatch.setattr(FirstTokens, "__init__", begins)
    monkeypatch.setattr(Lane, "over", property(lambda _: draw.random() < 0.3))
    return beside


def stops(ids, length):
    return ids[length - 1] % 17 == 0


def requests_of(draw, drafts):
    """Some that sample, or choose tokens by logits; prompts of up to three chunks."""
    policy = Speculative(DEPTH, max_pending=3, bar=0.0) if drafts else Full(DEPTH, max_pending=3)
    found = []
    for number in range(60):
        length = draw.choice([1, 3, 9, 20, 37, 80])
        seed = draw.choice([None, None, number])
        chooser = Chooser(sample=seed is not None, seed=seed)
        longest = length + draw.randint(1, NEW)
        found.append(Request(prompt(length, number), policy, longest, chooser, stops))
    return found


def decoded(engine, requests, draw, cancelled=()):
    """The text of each of `requests`, which come now and then. cancelled: behind some tokens."""
    texts, waiting = {request: list(request.ids) for request in requests}, [*requests]
    while waiting or engine.busy:
        for _ in range(draw.choice([0, 0, 0, 1, 2])):
            if waiting:
                engine.submit(waiting.pop())
        for request, token in engine.step():
            texts[request].append(token.id)
            if request in cancelled and len(texts[request]) > len(request.ids) + 3:
                engine.cancel(request)
    return texts


@pytest.mark.parametrize("slots", [2, 4, 6, 17])
@pytest.mark.parametrize("drafts", [False, True])
def test_prompts_are_read_while_others_go_on(drafts, slots, apart, monkeypatch):
    """Which pass is first does not matter: none writes to a slot of the other's, and texts are
    those that are decoded alone."""
    draw = random.Random(slots)
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: draw.choice([0, 0, 1, 3, 3]))
    requests, engine = requests_of(draw, drafts), engine_of(slots, 3)
    beside = watched(engine, monkeypatch, draw)
    texts = decoded(engine, requests, draw, cancelled=requests[30:33])
    assert sum(beside) > 20 or slots == 2  # where one text goes on alone
    alone = Engine(drafting(), [DRAFT], slots=1, capacity=150)
    for request, text in texts.items():
        again = Request(
            request.ids, Full(DEPTH), request.max_length, request.chooser, request.stops
        )  # fmt: skip
        full = [*request.ids, *(token.id for _, token in alone.stream([again]))]
        assert text == full[: len(text)]
        assert request.cancelled or len(text) == len(full)


@pytest.mark.parametrize("drafts", [False, True])
def test_the_device_hardly_waits_for_texts_that_come_and_go(drafts, apart, monkeypatch):
    """But while one is alone: then it is looked at first."""
    draw, begun, followed = random.Random(0), [], []
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: draw.choice([2, 3]))

    def kept(found, before):
        if before is None:
            begun.append(found)
        elif found is not None:
            followed.append((found.rows, before.rows))
        return found

    way, begin = (Together, Together._begin) if drafts else (Several, Several._begin)
    behind = Several._follow

    def begins(self, rows, count, before=None):
        return kept(begin(self, rows, count, *[before] * drafts), before)

    def follows(self, one, *given):
        return kept(behind(self, one, *given), one)

    monkeypatch.setattr(way, "_begin", begins)
    monkeypatch.setattr(Several, "_follow", follows)
    decoded(engine_of(6, 3), requests_of(draw, drafts), draw)
    assert sum(not {*new} <= {*old} for new, old in followed) > 10
    assert sum(not {*old} <= {*new} for new, old in followed) > 5
    assert len(begun) < 0.3 * len(followed)


def test_a_slot_again_and_again_in_place_of_idle_ones():
    """Where attention allows it: what is written for it is the same."""
    sizes = Sizes(32, 256, 4, compile=True, far=True)
    assert sizes.apart
    assert sizes.filled([3, 5, 9]) == [3] * 14 + [5, 9]
    assert sizes.filled([3, 5], CHUNK) == [3, 3, 3, 5]
    assert not sizes.in_order(list(range(32)))
    idle = Sizes(32, 256, 4, compile=True)
    assert idle.filled([3, 5]) == [0, 1, 3, 5]
    assert idle.in_order(list(range(32)))
