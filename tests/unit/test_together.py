"""Rounds of several texts, begun before the host has looked: those of the twin, which asks it."""

import random
from collections import defaultdict

import pytest
import torch
from helpers.compiling import kinds_met
from helpers.models import DEPTH, drafting
from helpers.prompts import prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_tuning.decode import Engine, Request, Speculative
from ee_tuning.decode.ahead import Ahead
from ee_tuning.decode.pace import Clock
from ee_tuning.decode.rounds import Line
from ee_tuning.decode.sampling import Chooser
from ee_tuning.decode.together import Together, _follow
from ee_tuning.exit_config import DRAFT


def engine_of(slots, most, together=True, **settings):
    engine = Engine(drafting(), [DRAFT], slots=slots, capacity=96, max_pending=most, **settings)
    engine.together = Together(engine.sequences) if together else None
    return engine


def run(engine, texts, most, ends=(), sample=False, bar=0.0):
    """What becomes of each text: its tokens, layers and confidences, and what was rejected."""
    requests = []
    for number, (length, longest) in enumerate(texts):
        chooser = Chooser(sample=sample, seed=number if sample else None)
        policy = Speculative(DEPTH, max_pending=most, bar=bar)
        stops = lambda ids, length: ids[length - 1] in ends  # noqa: E731
        requests.append(Request(prompt(length, number), policy, longest, chooser, stops))
    found = defaultdict(list)
    for request, token in engine.stream(requests):
        told = token.id, token.exit_layer, tuple(token.rejected), token.confidence
        found[requests.index(request)].append(told)
    return [found[number] for number in range(len(requests))]


@pytest.fixture
def rounds(monkeypatch):
    """How many rounds were begun behind another."""
    begun, behind = [], Together._behind
    monkeypatch.setattr(Together, "_behind", lambda *given: begun.append(1) or behind(*given))
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda paces, *_: paces[0].longest)
    return begun


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_rounds_are_those_of_the_twin(sample, compile, rounds, monkeypatch):
    """Prompts come while others draft, texts end by themselves or are as long as they may be."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    @settings(max_examples=12, deadline=None)
    @given(
        slots=st.integers(2, 6),
        most=st.integers(1, 5),
        texts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60)), min_size=2, max_size=9),
        ends=st.sets(st.integers(0, 60), max_size=3),
        bar=st.sampled_from([0.0, 0.02, 0.1]),
    )
    def check(slots, most, texts, ends, bar):
        texts = [(length, length + more) for length, more in texts]
        both = [
            run(engine_of(slots, most, one, compile=compile), texts, most, ends, sample, bar)
            for one in (True, False)
        ]
        for own, twin in zip(*both, strict=True):
            assert [one[:3] for one in own] == [one[:3] for one in twin]
            assert [one[3] for one in own] == pytest.approx([one[3] for one in twin], abs=1e-5)

    check()
    assert len(rounds) > 20


@pytest.mark.parametrize("compile", [False, True])
def test_texts_are_full_depths_whatever_is_planned(compile, monkeypatch):
    """Rounds, rests and one text that is given up in any order, other numbers of drafts each."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, draw, new = drafting(), random.Random(0), 50
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: draw.choice([0, 2, 4, 4, 4]))
    for seed in range(4):
        engine = engine_of(3 + seed, 4, compile=compile)
        engine.ahead = Ahead(engine.passes, engine.sequences.stops)
        policy = Speculative(DEPTH, max_pending=4, bar=0.0)
        requests = [Request(prompt(n, n), policy, n + new) for n in range(3 + seed, 9 + 2 * seed)]
        texts = {request: list(request.ids) for request in requests}
        for request, token in engine.stream(requests):
            texts[request].append(token.id)
            if request is requests[1] and len(texts[request]) > 20:
                engine.cancel(request)
        for request, text in texts.items():
            given = {"mode": "full", "max_new_tokens": new, "eos_token_id": None}
            full = model.generate(torch.tensor([request.ids]), **given).sequences[0].tolist()
            assert text == full[: len(text)]
            assert request.cancelled or text == full


@pytest.mark.parametrize("together", [False, True])
def test_no_size_of_pass_is_met_for_the_first_time(together, monkeypatch):
    """Behind `warm_up`, texts of every length, rounds of any number of drafts, rests; nor is
    anything else that would be compiled."""
    met = kinds_met(monkeypatch)
    draw, most, slots = random.Random(0), 4, 3
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: draw.randint(0, most))
    engine = engine_of(slots, most, together, compile=True)
    engine.warm_up()
    known, before = {*engine.passes.graphs._kept}, {*met}
    run(engine, [(draw.randint(1, 40), draw.randint(41, 90)) for _ in range(12)], most)
    assert {*engine.passes.graphs._kept} == known
    assert met == before


def test_rounds_take_no_less_than_they_took_the_device(monkeypatch):
    told, read = [], Line.read
    monkeypatch.setattr(Line, "read", lambda line: (read(line)[0], 8.0))
    monkeypatch.setattr("ee_tuning.decode.sequences.Clock", Clock)  # not the one of tests
    monkeypatch.setattr(Clock, "learn", lambda clock, *given: told.append(given))
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: 3)
    engine = engine_of(2, 3)
    for seed in range(2):
        engine.submit(Request(prompt(7, seed), Speculative(DEPTH, max_pending=3, bar=0.0), 47))
    for _ in range(4):
        engine.step()
    assert told == [(3, 8.0)] * 3


def test_the_device_finds_the_next_windows():
    """Of the drafts that the end agrees with and its own token; idle slots, and texts that would be
    longer than they may, stay where they are."""
    draw = torch.Generator().manual_seed(0)
    slots, most, length = 6, 4, 5
    for count in range(1, most + 1):
        rows = [4, 0, 1, 3, 5]
        longest = torch.tensor([40, 12, 90, 0, 90, 11])
        table = torch.randint(3, 9, (len(rows), 4 + length), generator=draw)
        table[:, 0], table[:, 2], table[:, 3] = torch.tensor(rows), 2, torch.tensor([4, 4, 3, 0, 4])
        drafts, ends = (torch.randint(0, 2, (5, n), generator=draw) for n in (count, count + 1))
        made = torch.minimum(torch.randint(0, count + 1, (5,), generator=draw), table[:, 3])
        chained, sure = torch.zeros(5, 1 + 2 * most), torch.rand(5, count)
        chained[:, 0], chained[:, 1 : 1 + count] = made, drafts
        chained[:, 1 + most : 1 + most + count] = sure
        answers = torch.stack([ends.float(), torch.rand(5, count + 1)])
        before, said = table.tolist(), torch.zeros(slots, 3 + 4 * most)
        _follow(said, table, chained, answers, longest)
        for row, slot in enumerate(rows):
            _, first, number, limit, *_ = before[row]
            kept = 0
            while kept < made[row] and drafts[row, kept] == ends[row, kept]:
                kept += 1
            left = int(longest[slot]) - (first + number + kept + 1)
            window = [*drafts[row, :kept].tolist(), int(ends[row, kept])]
            expected = [slot, first + number, kept + 1, min(limit, max(left - 1, 0)), *window]
            told = table[row].tolist()
            assert told[: 5 + kept] == expected if left > 0 else told == before[row]
            assert said[row, 0] == made[row]
            assert said[row, 1 : 1 + count].tolist() == drafts[row].tolist()
            assert said[row, 1 + most : 1 + most + count].equal(sure[row])
            assert said[row, 1 + 2 * most : 2 + 2 * most + count].tolist() == ends[row].tolist()
        assert not said[len(rows) :].any()
