"""Rounds of several texts, begun before the host has looked: those of the twin, which asks it."""

import math
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
from ee_tuning.decode.drafts import _learned
from ee_tuning.decode.pace import Clock, Pace
from ee_tuning.decode.rounds import Line
from ee_tuning.decode.sampling import Asked, Chooser, Token, choose
from ee_tuning.decode.sequences import Row
from ee_tuning.decode.together import Together, Underway, _follow, _hand_on
from ee_tuning.exit_config import DRAFT
from ee_tuning.passes.draws import ALL, NOTHING
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.wanted import Predictions


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
    begun, begin = [], Together._begin

    def count(together, rows, number, before):
        begun.extend([] if before is None else [1])
        return begin(together, rows, number, before)

    monkeypatch.setattr(Together, "_begin", count)
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
def test_no_text_has_more_drafts_a_round_than_it_may(together, monkeypatch):
    """Whatever others may have, and is planned for all."""
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: 4)
    engine, drafted = engine_of(2, 4, together), defaultdict(int)
    policies = [Speculative(DEPTH, max_pending=most, bar=0.0) for most in (1, 4)]
    requests = [Request(prompt(7, number), one, 60) for number, one in enumerate(policies)]
    kept = dict.fromkeys(requests, 0)
    for request, token in engine.stream(requests):
        kept[request] += token.exit_layer == DRAFT
        if token.exit_layer != DRAFT:
            most = requests.index(request)
            drafted[most] = max(drafted[most], kept[request] + len(token.rejected))
            kept[request] = 0
    assert drafted == {0: 1, 1: 4}


@pytest.mark.parametrize("together", [False, True])
def test_no_size_of_pass_is_met_for_the_first_time(together, monkeypatch):
    """Behind `warm_up`, texts of every length, rounds of any number of drafts, rests; nor is
    anything else that would be compiled."""
    met = kinds_met(monkeypatch)
    draw, most, slots = random.Random(0), 4, 3
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: draw.randint(0, most))
    monkeypatch.setattr(Passes, "branch", together)
    engine = engine_of(slots, most, together, compile=True)
    assert (engine.ahead is not None) == together
    engine.warm_up()
    known, before = {*engine.passes.graphs._kept}, {*met}
    run(engine, [(draw.randint(1, 40), draw.randint(41, 90)) for _ in range(12)], most)
    assert {*engine.passes.graphs._kept} == known
    assert met == before


@pytest.mark.parametrize(("family", "capacity"), [("llama", 600), ("gpt2", 96)])
def test_warming_up_looks_at_nothing_that_is_not_there(family, capacity, monkeypatch):
    """Nor does it again, when there were texts: no pass begins before its slot, or ends behind what
    it looks at; GPT-2 has no position before the first one."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(Passes, "branch", True)
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: 4)
    forward, seen = Passes.forward, []

    def looks(self, i, rows, length, reach, *rest):
        starts = self._control(length)[:rows, 1]
        seen.append((int(starts.min()) >= 0, int(starts.max()) + length <= reach))
        return forward(self, i, rows, length, reach, *rest)

    monkeypatch.setattr(Passes, "forward", looks)
    engine = Engine(
        drafting(family), [DRAFT], slots=3, capacity=capacity, max_pending=4, compile=True
    )
    for samples in ((NOTHING,), (ALL,)):
        engine.warm_up(samples=samples)
        run(engine, [(capacity - 40 - n, capacity - 10 * n) for n in range(3)], 4)
    assert seen.count((True, True)) == len(seen) > 100


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


def test_a_round_takes_until_its_tokens_are_handed_out(monkeypatch):
    """What comes between two rounds is part of the second; not what prompts took, nor a pause."""
    told = []
    monkeypatch.setattr("ee_tuning.decode.sequences.Clock", Clock)  # not the one of tests
    monkeypatch.setattr(Clock, "learn", lambda clock, drafts, seconds, *_: told.append(seconds))
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: 3)
    engine, now = engine_of(2, 3), [0.0]
    monkeypatch.setattr("ee_tuning.decode.sequences.time.perf_counter", lambda: now[0])
    for _ in range(2):
        for seed in range(2):
            policy = Speculative(DEPTH, max_pending=3, bar=0.0)
            engine.submit(Request(prompt(7, seed), policy, 20))
        now[0] += 50
        while engine.busy:
            engine.step()
            now[0] += 5
        rounds = len(told)
        assert told == [0.0, *[5.0] * (rounds - 1)]
        assert rounds > 2
        told.clear()


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
        sure, padding = torch.rand(5, count), torch.rand(2, 5, count % 2)
        rest = torch.zeros(5, most - count)
        chained = torch.cat([made[:, None], drafts, rest, sure, rest], 1)
        answers = torch.stack([ends.float(), torch.rand(5, count + 1)])
        answers = torch.cat([answers, padding], 2)
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


def test_windows_are_handed_on_to_other_rows():
    """Those of known rows stay as they are but for how many drafts they may have; others come."""
    draw, length = random.Random(0), 5
    for before, after, limit in ((2, 4, 3), (4, 2, 1), (4, 4, 4)):
        numbers = [[draw.randint(3, 9) for _ in range(3 + length)] for _ in range(8)]
        windows = [[slot, *numbers[slot]] for slot in range(4)]
        table, longest = torch.tensor(windows), torch.zeros(8, dtype=torch.int64)
        ends = [draw.randint(10, 20) for _ in range(8)]
        told, expected = [], []
        for place in range(after):
            row = draw.randrange(before)
            own, where = windows[row], after + row
            given = [row, 0, 0, limit, *[0] * length]
            if place % 2:
                own, where = [4 + place, *numbers[4 + place]], place
                given = [*own[:3], limit, *own[4:]]
            slot, first, number, _, *ids = own
            told.append([ends[slot], *given, where])
            drafts = max(0, min(limit, ends[slot] - first - number - 1))
            expected.append([slot, first, number, drafts, *ids])
        _hand_on(table, torch.tensor(told), longest)
        assert table.tolist() == [*expected, *windows[after:]]
        assert all(longest[slot] == end for end, slot, *_ in told)


def test_what_a_round_says_of_a_text_is_what_the_twin_makes_of_it():
    """Any number of drafts kept; of a token for which nothing speaks, the text fails alone."""
    engine, draw, most = engine_of(2, 4), random.Random(0), 4
    for _ in range(200):
        number, left = draw.randint(0, most), draw.randint(1, 9)
        drafts = [draw.randint(0, 1) for _ in range(most)]
        ends = [draw.randint(0, 1) for _ in range(most + 1)]
        sures = [draw.choice([0.5, 0.9, 0.25, 0.75]) for _ in range(2 * most + 1)]
        if draw.random() < 0.2:
            sures[most + draw.randint(0, most)] = draw.choice([math.nan, -math.inf])
        said = [float(one) for one in (number, *drafts, *sures[:most], *ends, *sures[most:])]
        rows = []
        for _ in range(2):
            policy = Speculative(DEPTH, max_pending=most, bar=0.0)
            rows.append(Row(Request([5, 6, 7], policy, 3 + left), 0, 1, True))
            rows[-1].pace = Pace(most, 0.1)
        own, twin = rows
        one = Underway([own], [0], draw.randint(number, most), {0: 3}, Line(torch.zeros(1)))
        _, tokens = engine.together._settle(own, one, said)

        twin.limit = max(0, min(one.number, twin.left - 1))
        pairs = zip(drafts[:number], sures, strict=False)
        twin.draft([Token(token, DRAFT, sure) for token, sure in pairs])
        answers = Predictions(torch.empty(0), [[ends], [sures[most:]]], [0])
        found = [answers.at(0, place) for place in range(number + 1)]
        asked = Asked(twin.request.chooser, twin.ids, found, twin.drafts)
        (choice,) = choose([asked])
        _, expected = _learned(twin, found, choice)
        assert tokens == expected
        assert str(own.request.error) == str(twin.request.error)
        if twin.request.error is None:
            known = (vars(row) | {"request": None, "policy": None, "pace": None} for row in rows)
            assert next(known) == next(known)
            assert vars(own.pace) == vars(twin.pace)
