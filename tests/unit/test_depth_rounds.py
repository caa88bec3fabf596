"""Rounds in which an exit at a layer drafts on the device are those of `draft_round`, the twin."""

import itertools
from functools import cache, partial

import pytest
import torch
from helpers.families import tiny
from helpers.models import early_exit
from helpers.prompts import prompt
from helpers.recorded import act_out
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.decode import Chooser, Engine, Full, Request, Speculative, limits
from ee_tuning.decode.ahead import Ahead
from ee_tuning.decode.settings import Audited
from ee_tuning.exit_config import LOOKUP

CAPACITY, MOST = 96, 3


@cache
def half_right(arch="norm", family="qwen3"):
    """A model with exits after layers 2 and 3 that agree with the end now and then: the layers
    behind, and the exits' own, change little."""
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("2,3", arch=arch)).eval()
    exits = [model.exit(2), model.exit(3)] if arch == "layer" else []
    for layer in [*list(model.backbone.layers)[2:], *(exit.block for exit in exits)]:
        for p in layer.parameters():
            p.data.mul_(0.3 if p.dim() >= 2 else 1)
    return model


@pytest.fixture(autouse=True)
def _as_many_as_may_be(monkeypatch):
    monkeypatch.setattr(limits, "plan", lambda paces, rooms, clock: paces[0].longest)


def engine_of(model, layers, device, most=MOST, slots=1, **settings):
    size = {"slots": slots, "capacity": CAPACITY, "max_pending": most}
    engine = Engine(model, layers, **size, **settings)
    engine.ahead = Ahead(engine.passes, engine.sequences.stops) if device else None
    return engine


def policy_of(threshold, most=MOST, layer=2, kind=Speculative, measure="probability"):
    return kind(4, {layer: threshold}, measure, most)


def chooser_of(sampled, top_k=0):
    warp = [TemperatureLogitsWarper(0.7), *([TopKLogitsWarper(top_k)] if top_k else [])]
    warp = LogitsProcessorList(warp if sampled else [])
    return Chooser(warp, sample=sampled, seed=5 if sampled else None)


def written(engine, policy, chooser=None, number=40, length=7, **stops):
    request = Request(prompt(length), policy, length + number, chooser or Chooser(), **stops)
    return [
        (token.id, token.exit_layer, token.confidence, token.ends, list(token.rejected))
        for _, token in engine.stream([request])
    ]


def both(model, policy, layers=(2, 3), **kwargs):
    """What is written by the device alone, in rounds, and by the twin."""
    engines = [engine_of(model, layers, device, policy.max_pending) for device in (True, False)]
    found = [written(engine, policy, **kwargs) for engine in engines]
    assert any(key[0] == "rounds" for key in engines[0].passes.graphs._kept)
    return found


def at_full_depth(model, chooser=None, **kwargs):
    engine = engine_of(model, [], False)
    return [token for token, *_ in written(engine, Full(4, max_pending=MOST), chooser, **kwargs)]


def middle(model, layer):
    """A threshold that half of the drafts of `layer` that are kept pass."""
    text = written(engine_of(model, [layer], False, 1), policy_of(0.0, 1, layer))
    sures = sorted(sure for _, at, sure, *_ in text if at == layer)
    return sures[len(sures) // 2]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("threshold", [0.0, None, 0.999], ids=["all", "some", "none"])
@pytest.mark.parametrize("arch", ["norm", "mlp", "layer"])
def test_tokens_and_drafts_are_those_of_the_twin(arch, threshold, sampled):
    """Layers, confidences and what was rejected, too."""
    model = half_right(arch)
    threshold = middle(model, 2) if threshold is None else threshold
    found, expected = both(model, policy_of(threshold), chooser=chooser_of(sampled))
    assert found == expected
    assert [token for token, *_ in found] == at_full_depth(model, chooser_of(sampled))
    if not threshold:
        assert any(rejected for *_, rejected in found)
    assert ({layer for _, layer, *_ in found} == {2, 4}) == (threshold < 0.9)


@pytest.mark.parametrize("most", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("all_leave", [False, True])
def test_with_any_number_of_drafts(most, all_leave):
    model = half_right("layer")
    policy = policy_of(0.0 if all_leave else middle(model, 2), most)
    found, expected = both(model, policy, number=60)
    assert found == expected
    if all_leave:
        assert max(len(rejected) for *_, rejected in found) == most


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral", "llama"])
def test_of_other_families(family):
    found, expected = both(half_right("layer", family), policy_of(0.0), number=60)
    assert found == expected
    assert {layer for _, layer, *_ in found} == {2, 4}


@pytest.mark.parametrize("measure", ["margin", "entropy"])
def test_by_other_measures(measure):
    model = half_right()
    sures = [one[2] for one in both(model, policy_of(0.0, measure=measure))[1] if one[1] == 2]
    found, expected = both(model, policy_of(sorted(sures)[len(sures) // 2], measure=measure))
    assert found == expected
    assert 0 < sum(one[1] == 2 for one in found) < len(sures)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_beside_other_exits_that_a_text_does_not_ask(layer):
    """A draft comes through several segments, and exits with K/V of their own keep them."""
    model = early_exit(arch="layer")
    engines = [engine_of(model, [1, 2, 3], device) for device in (True, False)]
    found, expected = (written(one, policy_of(0.0, layer=layer)) for one in engines)
    assert found == expected
    kept = [
        [cache.slot_layers[0].keys[0, :, : 7 + 38] for cache in one.passes.exit_caches.values()]
        for one in engines
    ]
    assert len(kept[0]) == 3
    for own, others in zip(*kept, strict=True):
        assert torch.equal(own, others)
        assert own.any(-1).all()


def test_an_exit_that_knows_some_tokens_drafts_these():
    model = EarlyExitModel.from_base(half_right().model, ExitConfig("2", "norm")).eval()
    model.exit(2).reduce_vocabulary(model.backbone, torch.arange(1, 96, 2))
    found, expected = both(model, policy_of(0.0), layers=[2], number=60)
    assert found == expected
    rejected = {token for *_, tokens in found for token in tokens}
    assert rejected
    assert all(token % 2 for token in rejected)


@pytest.mark.parametrize("top_k", [0, 5])
def test_drafts_are_drawn_as_those_of_the_twin(top_k):
    model = half_right()
    found, expected = both(model, policy_of(0.0), chooser=chooser_of(True, top_k), number=60)
    assert found == expected
    assert any(layer == 2 for _, layer, *_ in found)


@pytest.mark.parametrize("threshold", [0.0, None, 0.999], ids=["all", "some", "none"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 8, 40])
def test_audited_texts_have_all_drafts_to_their_end(threshold, number):
    """As many as may leave, whatever that takes."""
    model = half_right("layer")
    policy = policy_of(middle(model, 2) if threshold is None else threshold, kind=Audited)
    engines = [engine_of(model, [2], device) for device in (True, False)]
    found, expected = (written(one, policy, number=number) for one in engines)
    assert found == expected
    assert len(found) == number


@pytest.mark.parametrize("arch", ["norm", "mlp", "layer"])
@pytest.mark.parametrize("threshold", [0.0, None], ids=["all", "some"])
@pytest.mark.parametrize("number", range(1, MOST + 1))
def test_captured_rounds_read_what_is_there_when_they_run(arch, threshold, number, monkeypatch):
    """Of fewer drafts than there may be, too: the step that computes the last one is another."""
    model = half_right(arch)
    policy = policy_of(middle(model, 2) if threshold is None else threshold)
    monkeypatch.setattr(limits, "plan", lambda paces, rooms, clock: number)
    expected = written(engine_of(model, [2], False), policy, number=24)
    engine = engine_of(model, [2], True)
    act_out(engine.passes.graphs, monkeypatch)
    found = written(engine, policy, number=24)
    assert [(one[:2], one[4]) for one in found] == [(one[:2], one[4]) for one in expected]


@pytest.mark.slow
def test_compiled_rounds_give_the_same(monkeypatch):
    """Traced as for the compiler, but not translated, which takes ten times as long."""
    torch._dynamo.reset()
    traced = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    model, texts = half_right("mlp"), []
    for one in (True, False):
        engine = engine_of(model, [2], True, compile=one)
        found = written(engine, policy_of(middle(model, 2)), chooser_of(True), number=24)
        texts.append([(one[:2], one[4]) for one in found])
    assert texts[0] == texts[1]


def test_a_round_begins_before_the_one_before_it_was_read():
    engine = engine_of(half_right(), [2], True)
    engine.submit(Request(prompt(7), policy_of(0.0), 90))
    underway = []
    while engine.step():
        underway += [engine.ahead.rounds.underway(row) for row in engine.sequences.live]
    assert underway[:2] == [False, False]  # behind the prompt, and a text's first round
    assert all(underway[2:-3])


@pytest.mark.parametrize("number", range(1, MOST + 1))
def test_a_round_computes_each_layer_once(number, monkeypatch):
    """Of each draft those up to the exit, then of all those behind it; no other exit is asked, nor
    this one behind the last draft."""
    monkeypatch.setattr(limits, "plan", lambda paces, rooms, clock: number)
    engine, seen = engine_of(half_right(), [2, 3], True), []
    engine.submit(Request(prompt(7), policy_of(0.0, layer=3), 90))
    for _ in range(4):
        made = engine.step()
    assert sum(len(token.rejected) + (token.exit_layer == 3) for _, token in made) == number
    forward = engine.passes.forward

    def counted(i, rows, length, reach, in_order, wanted):
        seen.append((i, length, wanted.after))
        return forward(i, rows, length, reach, in_order, wanted)

    engine.passes.forward = counted
    engine.step()
    first = (0, 1, "nothing")
    assert seen[:-1] == [first, (1, 1, "last")] * number + [first, (1, 1, "nothing")]
    assert seen[-1] == (2, MOST + 1, "each")


@pytest.mark.parametrize("end", [1, 2, 5, 9])
def test_a_text_ends_within_rounds(end):
    """What the device has written behind the end is not the text's, nor the next one's."""
    model = half_right("layer")
    engine = engine_of(model, [2], True)
    whole = written(engine_of(model, [2], False), policy_of(0.0))
    found = written(engine, policy_of(0.0), stops=lambda _, length: length == 7 + end)
    assert [one[:2] for one in found] == [one[:2] for one in whole[:end]]
    assert [one[3] for one in found] == [False] * (end - 1) + [True]
    again = written(engine, policy_of(0.0), length=5)
    assert again == written(engine_of(model, [2], False), policy_of(0.0), length=5)


def test_texts_of_other_thresholds_follow_each_other():
    model, texts = half_right(), []
    for device in (True, False):
        engine = engine_of(model, [2, 3], device)
        policies = [
            policy_of(0.0), policy_of(0.999), policy_of(0.0, layer=3), policy_of(middle(model, 2)),
        ]  # fmt: skip
        texts.append([written(engine, policy) for policy in policies])
    assert texts[0] == texts[1]
    assert [2 in {layer for _, layer, *_ in text} for text in texts[0]] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("arch", ["norm", "layer"])
def test_texts_come_and_go(arch):
    """What the device has begun is read before another text comes, and both are what they are
    alone."""
    model, policy = half_right(arch), policy_of(0.0)
    sizes = ((7, 30), (9, 60), (5, 9), (8, 40))
    alone = [at_full_depth(model, length=one, number=more) for one, more in sizes]
    engine, seen = engine_of(model, [2], True, slots=2), []
    requests = [Request(prompt(one), policy, one + more) for one, more in sizes]
    texts = {id(request): [] for request in requests}
    for request in requests:
        engine.submit(request)
        for _ in range(6):
            for one, token in engine.step():
                texts[id(one)].append(token.id)
            live = engine.sequences.live
            seen += [(len(live), engine.ahead.rounds.underway(live[0]))] if live else []
    while events := engine.step():
        for one, token in events:
            texts[id(one)].append(token.id)
    assert [*texts.values()] == alone
    assert {*seen} == {(1, True), (1, False), (2, False)}


def test_a_text_rests_where_drafts_do_not_pay(monkeypatch):
    """And drafts again later; the exit has the K/V of what came meanwhile."""
    model, texts = half_right("layer"), []
    for device in (True, False):
        plans = itertools.cycle([3, 3, 2, 0, 0, 1])
        monkeypatch.setattr(limits, "plan", lambda *_, plans=plans: next(plans))
        engine = engine_of(model, [2], device)
        texts.append([token for token, *_ in written(engine, policy_of(0.0), number=60)])
    assert texts[0] == texts[1] == at_full_depth(model, number=60)


def test_paces_learn_from_what_was_made(monkeypatch):
    monkeypatch.undo()
    model, policy = half_right(), policy_of(middle(half_right(), 2))
    engine, learnt = engine_of(model, [2], True), []
    request = Request(prompt(7), policy, 90)
    engine.submit(request)
    engine.step()
    (row,) = engine.sequences.live
    learn = row.pace.learn
    row.pace.learn = lambda *told: learnt.append(told) or learn(*told)
    tokens = [token for _ in range(40) for _, token in engine.step()]
    rounds, drafted = [], 0
    for token in tokens:
        drafted += token.exit_layer == 2
        if token.exit_layer == 4:
            rounds.append((drafted + len(token.rejected), drafted))
            drafted = 0
    assert learnt
    assert [one for one in rounds if one[0]] == [told[1:] for told in learnt if told[1]]
    assert all(made <= limit for limit, made, _ in learnt)


def test_no_numbers_within_rounds_fail_a_text_behind_what_was_right():
    engine = engine_of(half_right(), [2], True)
    settle, seen = engine.ahead.rounds._settle, []

    def spoilt(*given):
        seen.append(1)
        *others, answers = given
        if len(seen) >= 6:
            answers = torch.stack([answers[0], torch.full_like(answers[1], torch.nan)])
        settle(*others, answers)

    engine.ahead.rounds._settle = spoilt
    request = Request(prompt(7), policy_of(0.0), 67)
    engine.submit(request)
    events = [event for _ in range(12) for event in engine.step()]
    tokens = [token.id for _, token in events if token is not None]
    assert 3 < len(tokens) < 60
    assert tokens == at_full_depth(half_right(), number=60)[: len(tokens)]
    assert events[-1] == (request, None)
    assert "not finite" in str(request.error)


def test_several_exits_and_texts_beside_one_are_left_to_the_host():
    model = half_right()
    engine = engine_of(model, [LOOKUP, 2, 3], True)
    for policy, served in (
        (policy_of(0.0), True),
        (policy_of(0.0, kind=Audited), True),
        (Speculative(4, {2: 0.0, 3: 0.0}, max_pending=MOST), False),
        (Speculative(4, {2: 0.0}, max_pending=MOST, lookup=True), False),
        (Speculative(4, {}, max_pending=MOST, lookup=True), True),
    ):
        engine.submit(Request(prompt(7), policy, 20))
        engine.step()
        assert engine.ahead.rounds.serves(policy) == served
        engine.clear()


def test_what_is_warm_is_all_that_texts_ask_for():
    engine = engine_of(half_right(), [2, 3], True)
    jobs, few = (
        engine.ahead.rounds.to_warm(["probability"], [(0, 0)], layers, texts=False)
        for layers in (True, False)
    )
    assert len(jobs) > len(few)
    for job in jobs:
        with torch.inference_mode():
            job()
    warm = len(engine.passes.graphs)
    for layer in (2, 3):
        written(engine, policy_of(0.0, layer=layer), number=60)
    assert len(engine.passes.graphs) == warm > 0
