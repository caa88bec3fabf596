"""Texts side by side: they draft where that pays for all, and clocks are told what rounds take."""

import random
from types import SimpleNamespace

import pytest
import torch
from helpers.models import drafting
from helpers.prompts import prompt

from ee_tuning.decode import Engine, Full, Request, Speculative, drafts, limits
from ee_tuning.decode.ahead import Ahead
from ee_tuning.decode.alone import TOKENS
from ee_tuning.decode.pace import Clock, Pace, plan
from ee_tuning.decode.rounds import Line
from ee_tuning.exit_config import DRAFT

ROWS, LONGEST, NEW, COST = 8, 6, 128, 0.06
# Of a token at full depth: a round with drafts takes as long as two and more, one more draft so
# much, and each look of the host so much more than what the device takes.
ROUND, DRAFT_TAKES, LOOK, PLANNED = 2.1, 0.06, 0.3, 0.07


class Eight:
    """Texts that begin together, in an engine that goes on with the next ones: see `seconds`."""

    def __init__(self, chances, seed=0, half=ROUND):
        """chances: of each text's drafts. half: what a round takes of half as many at most."""
        self.half = half
        self.chances, self.draw, self.noise = chances, random.Random(seed), random.Random(seed)
        sizes = [LONGEST] if half == ROUND else [LONGEST // 2, LONGEST]
        self.clock, self.rounds = Clock(COST, most=sizes), 0

    def full(self):
        """What they take without drafts."""
        return NEW * (1 + LOOK / TOKENS)

    def seconds(self):
        """What they take until the last one has ended."""
        paces, at = [Pace(LONGEST, COST, stops=False) for _ in range(ROWS)], [0] * ROWS
        total = 0.0
        while live := [i for i in range(ROWS) if at[i] < NEW]:
            asked = 2 * sum(paces[i].rests > 0 for i in live) <= len(live)
            number = plan([paces[i] for i in live], [NEW - at[i] for i in live], self.clock)
            rounds = 1 if number else min(TOKENS, max(NEW - at[i] for i in live))
            drafted = self.half if number <= LONGEST // 2 else ROUND
            took = (drafted + DRAFT_TAKES * number) if number else rounds
            took = (took + LOOK + PLANNED * asked) * self.noise.lognormvariate(0, 0.03)
            for i in live:
                if not number:
                    paces[i].rest(rounds)
                    at[i] += rounds
                    continue
                most, kept = min(number, NEW - at[i] - 1), 0
                while kept < most and self.draw.random() < self.chances[i]:
                    kept += 1
                paces[i].learn(most, most, kept)
                at[i] += kept + 1
            self.rounds += number > 0
            self.clock.learn(number, took / rounds, rounds)
            total += took
        return total


def ratios(*chances, seeds=5, calls=6, **settings):
    """Against full depth, of some calls in each of some engines; rounds with drafts of a call."""
    found, rounds = [], 0
    for seed in range(seeds):
        eight = Eight([chances[i % len(chances)] for i in range(ROWS)], seed, **settings)
        found += [eight.full() / eight.seconds() for _ in range(calls)]
        rounds += eight.rounds
    return found, rounds / seeds / calls


@pytest.mark.parametrize("chance", [0.02, 0.4, 0.5, 0.56])
def test_texts_rest_where_drafts_bring_less_than_their_rounds_take(chance):
    """Six drafts that are kept with a chance of 0.56 bring 2.2 tokens in the time of 2.6."""
    found, rounds = ratios(chance)
    assert sum(found) / len(found) > 0.97
    assert min(found) > 0.94
    assert rounds < 3


@pytest.mark.parametrize(("chance", "least"), [(0.85, 1.3), (0.9, 1.5)])
def test_texts_draft_where_that_pays(chance, least):
    found, _ = ratios(chance)
    assert sum(found) / len(found) > least
    assert min(found) > 1


@pytest.mark.parametrize(("chance", "best"), [(0.6, 1.139), (0.7, 1.327), (0.9, 1.838)])
def test_half_of_the_drafts_are_found_to_pay_most(chance, best):
    """best: what always as many would be, without looks at other rounds."""
    found, _ = ratios(chance, half=1.3)
    assert sum(found) / len(found) > 0.96 * best
    assert min(found) > 0.95


@pytest.mark.parametrize("chances", [(0.9, 0.2), (0.9, 0.9, 0.2, 0.2), (0.9, *[0.1] * 7)])
def test_no_text_pays_for_what_drafts_bring_others(chances):
    found, _ = ratios(*chances)
    assert sum(found) / len(found) > 0.96
    assert min(found) > 0.93


def test_resting_texts_are_not_asked_each_time():
    clock, paces = Clock(COST), [Pace(LONGEST, COST, stops=False) for _ in range(3)]
    clock.learn(0, 1.0)
    for _ in range(9):
        clock.learn(6, 9.0)
    rooms, margins = [NEW] * 3, []
    for pace in paces:
        for _ in range(9):
            pace.learn(6, 6, 0)
        margin = pace.margin
        pace.margin = lambda *given, margin=margin: margins.append(1) or margin(*given)
    clock.LEAST = 0
    clock.learn(0, 1.0)
    assert [plan(paces, rooms, clock) for _ in range(2 * (1 + Pace.RESTS))] == [0] * 8
    assert len(margins) == 2 * 3
    assert plan(paces, rooms, clock) == 0
    assert len(margins) == 3 * 3
    paces[1] = Pace(LONGEST, COST, stops=False)
    plan(paces, rooms, clock)
    assert len(margins) == 3 * 3  # a new text among others waits with them
    paces[2] = Pace(LONGEST, COST, stops=False)
    plan(paces, rooms, clock)
    assert len(margins) == 3 * 3 + 1  # of most nothing is known


def engine_of(slots, most, **settings):
    engine = Engine(drafting(), [DRAFT], slots=slots, capacity=96, max_pending=most, **settings)
    engine.ahead = Ahead(engine.passes, engine.sequences.stops)
    return engine


@pytest.mark.parametrize("compile", [False, True])
def test_rounds_of_several_texts_are_told_apart_by_the_pass_that_verifies(compile, monkeypatch):
    """Compiled ones of five tokens are for one or two drafts, or for all four."""
    monkeypatch.setattr("ee_tuning.decode.sequences.Clock", Clock)  # not the one of tests
    sequences, took = engine_of(3, 4, compile=compile).sequences, {1: 1.3, 2: 1.3, 3: 2.0, 4: 2.0}
    for number, alike in ((1, False), (2, compile)):
        clock = sequences.clock(number, 0.01)
        clock.learn(0, 1.0)
        for _ in range(9):
            for asked, seconds in took.items():
                clock.learn(asked, seconds)
        found = [clock.rounds(asked) for asked in took]
        assert (found == pytest.approx([*took.values()], abs=0.02)) is alike


def test_a_clock_is_told_what_all_of_a_round_takes(monkeypatch):
    """Of rests and of rounds with drafts alike: the host's plan, what the draft exit has to catch
    up with, and the passes. Of a first rest it is what the device takes."""
    now, told, most = [0.0], [], 3
    plans = iter([0, 0, 0, *[most] * 9])

    def takes(owner, name, seconds):
        function = getattr(owner, name)

        def slow(*given, **how):
            now[0] += seconds(*given)
            return function(*given, **how)

        monkeypatch.setattr(owner, name, slow)

    watch = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("ee_tuning.decode.sequences.time", watch)
    monkeypatch.setattr("ee_tuning.decode.sequences.Clock", Clock)  # not the one of tests
    monkeypatch.setattr(Clock, "learn", lambda clock, *given: told.append(given))
    monkeypatch.setattr(limits, "plan", lambda *_: next(plans))
    engine = engine_of(3, most)
    takes(limits, "plan", lambda *_: 0.5)
    takes(engine.sequences, "catch_up", lambda *_: 0.25)
    takes(engine.several, "go_on", lambda _, count: count)
    takes(drafts, "chain_round", lambda *_: 2.0)
    for seed in range(3):
        policy = Speculative(4, {}, max_pending=most, bar=0.0)
        engine.submit(Request(prompt(7, seed), policy, 7 + 30))
    for _ in range(7):  # one of them reads what was begun behind the last rest
        engine.step()
    half = TOKENS // 2
    assert told[0][0] == 0
    assert 0 < told[0][1] < 0.75
    assert told[1:] == [*[(0, (0.75 + TOKENS) / half, half)] * 2, *[(most, 2.75)] * 2]


@pytest.mark.parametrize("compile", [False, True])
def test_texts_rest_beside_one_at_full_depth(compile, monkeypatch):
    """Rounds with drafts would take longer for that one, too. They draft before and behind it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(limits, "plan", lambda *_: 3)
    engine = engine_of(3, 3, compile=compile)
    policy, other = Speculative(4, {}, max_pending=3, bar=0.0), Full(4, max_pending=3)
    for seed in range(2):
        engine.submit(Request(prompt(7, seed), policy, 70))
    late, drafts = Request(prompt(9, 5), other, 20), {}
    for step in range(99):
        if step == 4:
            engine.submit(late)
        when = "before" if step < 4 else "behind" if late.finished else "beside"
        own = [token for request, token in engine.step() if request is not late]
        drafts.setdefault(when, []).append(sum(token.exit_layer == DRAFT for token in own))
    assert sum(drafts["before"]) > 0
    assert sum(drafts["beside"][2:]) == 0  # a round may be under way when it comes
    assert len(drafts["beside"]) > 5
    assert sum(drafts["behind"]) > 0


def test_a_rest_takes_no_less_than_it_took_the_device(monkeypatch):
    """Which may have been at it before the host came to look."""
    told, read = [], Line.read
    monkeypatch.setattr(Line, "read", lambda line: (read(line)[0], 8.0))
    monkeypatch.setattr("ee_tuning.decode.sequences.Clock", Clock)  # not the one of tests
    monkeypatch.setattr(Clock, "learn", lambda clock, *given: told.append(given))
    monkeypatch.setattr(limits, "plan", lambda *_: 0)
    engine = engine_of(3, 3)
    for seed in range(3):
        policy = Speculative(4, {}, max_pending=3, bar=0.0)
        engine.submit(Request(prompt(7, seed), policy, 7 + 30))
    for _ in range(4):
        engine.step()
    half = TOKENS // 2
    assert told == [(0, 8.0 / half, half)] * 3
