"""Drafts of a text of its own that the device finds, in rounds that the host looks at later."""

import itertools
from functools import partial

import pytest
import torch
from helpers.lookups import let_texts_draft, repeating
from helpers.models import drafting, good_exit
from helpers.recorded import act_out
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from ee_tuning.decode import Chooser, Engine, Full, Request, Speculative, drafts
from ee_tuning.decode.ahead import Ahead
from ee_tuning.decode.lookup import MATCH, Limits, Looked, Lookup, find, look
from ee_tuning.exit_config import DRAFT, LOOKUP

CAPACITY, MOST = 128, 3
ALWAYS = (0, *[MOST] * MATCH)


@settings(deadline=None)
@given(
    ids=st.integers(1, 5).flatmap(
        lambda size: st.lists(st.integers(0, size), min_size=1, max_size=60)
    ),
    room=st.integers(0, 40),
    match=st.integers(1, 5),
)
def test_what_is_found_is_what_the_host_finds(ids, room, match):
    """Of texts of any length, whatever stands behind them."""
    text = torch.randint(0, 5, (len(ids) + room,), generator=torch.Generator().manual_seed(room))
    text[: len(ids)] = torch.tensor(ids)
    size, place = find(text, torch.tensor([len(ids)]), match)
    expected = Lookup(match).find(ids)
    assert size.item() == expected[0]
    if expected[0]:
        assert place.item() == expected[1]


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    windows=st.lists(st.integers(1, 4), max_size=20),
    most=st.integers(1, 5),
    limits=st.lists(st.integers(0, 5), min_size=MATCH, max_size=MATCH),
)
def test_a_text_grows_by_what_is_settled(ids, windows, most, limits):
    """Drafts are as many as are wanted behind so many tokens, and there."""
    limits = [0, *(min(limit, most) for limit in limits)]
    text, lookup = torch.full((64,), 7), Lookup()
    looked = Looked(torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1, most).long())
    length = 0
    for count in windows:
        window = ids[length : length + count]
        if not window:
            break
        table = [[0, length, len(window), 0, *window, *[9] * (4 - len(window))]]
        look(text, torch.tensor(table), torch.tensor(limits), looked)
        length += len(window)
        size, place = lookup.find(ids[:length])
        expected = ids[place : min(length, place + limits[size])] if size else []
        assert text[:length].tolist() == ids[:length]
        assert looked.size.item() == size
        assert looked.drafts[0, : looked.number.item()].tolist() == expected


# -- in rounds -----------------------------------------------------------------------------------


@pytest.fixture
def always(monkeypatch):
    """All drafts of a text are taken, by the device and by the host, and else those of an exit."""
    let_texts_draft(monkeypatch, most=MOST)
    each = Limits(MOST, ALWAYS)
    for plan in ("by_text", "beside_text"):
        monkeypatch.setattr(drafts, plan, lambda *_: (each, each))


def engine_of(model, device, exit=False, slots=1, **settings):
    layers = [LOOKUP, DRAFT] if exit else [LOOKUP]
    engine = Engine(model, layers, slots=slots, capacity=CAPACITY, max_pending=MOST, **settings)
    engine.ahead = Ahead(engine.passes, engine.sequences.stops) if device else None
    return engine


def policy_of(exit=False, bar=0.0):
    return Speculative(4, {}, max_pending=MOST, bar=bar if exit else None, lookup=True)


def chooser_of(sampled):
    warp = LogitsProcessorList([TemperatureLogitsWarper(0.05)] if sampled else [])
    return Chooser(warp, sample=sampled, seed=5 if sampled else None)


def written(engine, policy, sampled=False, number=60, length=30, seed=0, stops=None):
    """Tokens with their layers and the drafts that they came in the place of."""
    ids = repeating(length, seed)
    stop = [stops] if stops else []
    request = Request(ids, policy, length + number, chooser_of(sampled), *stop)
    return [
        (token.id, token.exit_layer, list(token.rejected)) for _, token in engine.stream([request])
    ]


def at_full_depth(model, **kwargs):
    engine = Engine(model, [], capacity=CAPACITY, max_pending=MOST)
    return [token for token, *_ in written(engine, Full(4, max_pending=MOST), **kwargs)]


MODELS = {
    "llama": lambda: good_exit("llama"),
    "bf16": lambda: good_exit.__wrapped__("llama").to(torch.bfloat16),
    "mistral": lambda: good_exit("mistral"),
    "gpt2": lambda: good_exit("gpt2"),
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rounds_have_the_drafts_of_the_twin(always, name, sampled):
    """And keep the same. Near the end there are fewer: a round that begins before it is known how
    much is left goes no further than there is room in any case."""
    model = MODELS[name]()
    found, expected = (
        written(engine_of(model, device), policy_of(), sampled) for device in (True, False)
    )
    assert found[:50] == expected[:50]
    assert [token for token, *_ in found] == at_full_depth(model, sampled=sampled)
    assert any(layer == LOOKUP for _, layer, _ in found)
    assert any(rejected for *_, rejected in found)


@pytest.mark.parametrize("bar", [0.0, 0.001, 0.9])
@pytest.mark.parametrize("sampled", [False, True])
def test_an_exit_drafts_where_the_text_has_nothing(always, bar, sampled):
    model = drafting()
    found, expected = (
        written(engine_of(model, device, True), policy_of(True, bar), sampled)
        for device in (True, False)
    )
    assert found[:50] == expected[:50]
    assert [token for token, *_ in found] == at_full_depth(model, sampled=sampled)
    if not sampled:
        assert {layer for _, layer, _ in found} == {LOOKUP, DRAFT, 4}


@pytest.mark.parametrize("exit", [False, True])
def test_captured_rounds_read_what_is_there_when_they_run(always, exit, monkeypatch):
    model = drafting() if exit else good_exit("llama")
    engine = engine_of(model, True, exit)
    act_out(engine.passes.graphs, monkeypatch)
    found = written(engine, policy_of(exit))
    monkeypatch.undo()
    assert [token for token, *_ in found] == at_full_depth(model)
    assert any(layer == LOOKUP for _, layer, _ in found)


@pytest.mark.slow
@pytest.mark.parametrize("exit", [False, True])
def test_compiled_rounds_give_the_same(always, exit, monkeypatch):
    """Traced as for the compiler, but not translated, which takes ten times as long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = drafting() if exit else good_exit("llama")
    found, expected = (
        written(engine_of(model, True, exit, compile=one), policy_of(exit), number=24)
        for one in (True, False)
    )
    assert found == expected


def test_a_round_begins_before_the_one_before_it_was_read(always):
    engine = engine_of(good_exit("llama"), True)
    ids = repeating(30)
    engine.submit(Request(ids, policy_of(), 90))
    underway = []
    while engine.step():
        underway += [engine.ahead.rounds.underway(row) for row in engine.sequences.live]
    assert underway[:2] == [False, False]  # behind the prompt, and a text's first round
    assert all(underway[2:-2])


@pytest.mark.parametrize("end", [1, 2, 5, 9])
def test_a_text_ends_within_rounds(always, end):
    """What the device has written behind the end is not the text's."""
    model = good_exit("llama")
    found = written(engine_of(model, True), policy_of(), stops=lambda _, length: length == 30 + end)
    assert [token for token, *_ in found] == at_full_depth(model)[:end]


@pytest.mark.parametrize("exit", [False, True])
def test_texts_come_and_go(always, exit):
    """What the device knows of a text is not taken for another's: some are alone for a while, and
    side by side with others."""
    model, texts = drafting() if exit else good_exit("llama"), []
    for policy in (policy_of(exit), Full(4, max_pending=MOST)):
        engine = engine_of(model, True, exit, slots=2)
        requests = [
            Request(repeating(length, length), policy, length + number)
            for length, number in ((20, 12), (31, 60), (12, 9), (25, 40), (9, 30))
        ]
        found = {id(request): [] for request in requests}
        engine.submit(requests[0])
        for request in requests[1:]:
            for _ in range(4):
                for one, token in engine.step():
                    found[id(one)].append(token.id)
            engine.submit(request)
        while events := engine.step():
            for one, token in events:
                found[id(one)].append(token.id)
        texts.append([*found.values()])
    assert texts[0] == texts[1]
    assert [len(text) for text in texts[0]] == [12, 60, 9, 40, 30]


@pytest.mark.parametrize("exit", [False, True])
def test_a_text_rests_where_drafts_do_not_pay(exit, monkeypatch):
    """And goes on by rounds later, with what it has grown by."""
    let_texts_draft(monkeypatch, most=MOST)
    plans = itertools.cycle([*[Limits(MOST * exit, ALWAYS)] * 6, *[Limits()] * 6])
    for plan in ("by_text", "beside_text"):
        monkeypatch.setattr(drafts, plan, lambda *_: (next(plans), next(plans)))
    model = drafting() if exit else good_exit("llama")
    found = written(engine_of(model, True, exit), policy_of(exit), number=80)
    assert [token for token, *_ in found] == at_full_depth(model, number=80)
    assert any(layer == LOOKUP for _, layer, _ in found)


def test_what_is_warm_is_all_that_texts_ask_for(always):
    for model, exit in ((good_exit("llama"), False), (drafting(), True)):
        engine = engine_of(model, True, exit)
        few, jobs = (
            engine.ahead.rounds.to_warm(["probability"], [(0, 0)], False, texts)
            for texts in (False, True)
        )
        assert len(jobs) > len(few)  # no more than a server without --lookup is asked for
        for job in jobs:
            with torch.inference_mode():
                job()
        warm = len(engine.passes.graphs)
        written(engine, policy_of(exit))
        assert len(engine.passes.graphs) == warm > 0
