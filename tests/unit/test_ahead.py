"""Tokens that the device decides on are those of its twin, which asks the host at every exit."""

import itertools
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.families import tiny
from helpers.models import drafting, early_exit
from helpers.prompts import prompt
from helpers.recorded import Recorder, act_out, attend
from helpers.slow_decoder import draft_loop
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.decode import (
    Chooser,
    Engine,
    Fixed,
    Full,
    Request,
    Speculative,
    Threshold,
    drafts,
    limits,
    straight,
)
from ee_tuning.decode.ahead import Ahead, _decide, cuts_beside
from ee_tuning.decode.alone import TOKENS
from ee_tuning.decode.pace import Pace
from ee_tuning.decode.sequences import Row
from ee_tuning.decode.straight import Look, Several, Timing
from ee_tuning.exit_config import DRAFT, LOOKUP
from ee_tuning.passes import branches
from ee_tuning.passes.graphs import Beside

CAPACITY = 96
SOME = {1: 0.0296, 2: 0.0275, 3: 0.0225}  # of which each is passed now and then


def engine_of(model, layers, ahead, slots=1, **settings):
    engine = Engine(model, layers, slots=slots, capacity=CAPACITY, max_pending=3, **settings)
    engine.ahead = Ahead(engine.passes, engine.sequences.stops) if ahead else None
    return engine


def written(engine, policy, number=40, seed=None, warp=(), length=7):
    chooser = Chooser(warp, sample=seed is not None, seed=seed)
    request = Request(prompt(length), policy, length + number, chooser)
    return [
        (token.id, token.exit_layer, token.confidence, token.ends)
        for _, token in engine.stream([request])
    ]


def both(model, layers, policy, **kwargs):
    """What is written ahead, and by the twin."""
    engines = [engine_of(model, layers, ahead) for ahead in (True, False)]
    return [written(engine, policy, **kwargs) for engine in engines]


POLICIES = {
    "full": lambda: Full(4, max_pending=3),
    "fixed": lambda: Fixed(2, max_pending=3),
    "some leave": lambda: Threshold(4, SOME, max_pending=3),
    "one exit of three": lambda: Threshold(4, {2: 0.02}, max_pending=3),
    "all leave": lambda: Threshold(4, {1: 0.0, 2: 0.0}, max_pending=3),
    "one may be pending": lambda: Threshold(4, {1: 0.0, 3: 0.0}, max_pending=1),
    "none may be": lambda: Threshold(4, {1: 0.0}, max_pending=0),
    "margin": lambda: Threshold(4, {1: 0.001, 2: 0.002}, "margin", max_pending=3),
}


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_layers_and_confidences_are_those_of_the_twin(name):
    found, expected = both(early_exit(), [1, 2, 3], POLICIES[name]())
    assert found == expected
    assert len(found) == 40


def test_tokens_leave_at_every_layer():
    """So the cases above are about something."""
    found, _ = both(early_exit(), [1, 2, 3], POLICIES["some leave"]())
    assert {layer for _, layer, *_ in found} == {1, 2, 3, 4}


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral", "qwen3"])
def test_of_other_families(family):
    found, expected = both(early_exit(family), [1, 2, 3], POLICIES["some leave"]())
    assert found == expected


BESIDE = {
    "full": Full(4, max_pending=3),
    "fixed": Fixed(3, max_pending=3),
    "some leave": Threshold(4, {1: 0.0296, 3: 0.0225}, max_pending=3),
    "the first alone": Threshold(4, {1: 0.0296}, max_pending=3),
    "all leave": Threshold(4, {1: 0.0, 3: 0.0}, max_pending=1),
    "none leave": Threshold(4, {1: 0.999, 3: 0.999}, max_pending=3),
    "the end is an exit": Threshold(3, {1: 0.0296}, max_pending=3),
}


@pytest.mark.parametrize("name", BESIDE)
def test_an_exit_is_asked_beside_the_layers_behind_it(name, monkeypatch):
    """What it says is looked at behind these: the same text, of which more is computed."""
    model, policy = early_exit(arch="layer"), BESIDE[name]
    expected = written(engine_of(model, [1, 3], False), policy, 24)
    monkeypatch.setattr("ee_tuning.decode.engine.cuts_beside", lambda *_: [2])
    engine = engine_of(model, [1, 3], True)
    assert engine.sequences.stops == [1, 2, 3, 4]
    assert written(engine, policy, 24) == expected
    # The host finds the same where the device does not decide.
    assert written(engine_of(model, [1, 3], False), policy, 24) == expected


def test_captured_steps_ask_beside_layers(monkeypatch):
    model, policy = early_exit(arch="mlp"), BESIDE["some leave"]
    expected = written(engine_of(model, [1, 3], False), policy, 24)
    monkeypatch.setattr("ee_tuning.decode.engine.cuts_beside", lambda *_: [2])
    engine = engine_of(model, [1, 3], True)
    act_out(engine.passes.graphs, monkeypatch)
    assert [one[:2] for one in written(engine, policy, 24)] == [one[:2] for one in expected]


@pytest.mark.parametrize("arch", ["mlp", "layer", "norm"])
def test_what_is_asked_beside_layers_may_be_late(arch, monkeypatch):
    """As late as it is awaited: what it reads is not written over before."""
    late = []

    class Late(Beside):
        open = False

        @contextmanager
        def work(self):
            self.open = True
            yield
            self.open = False

        def await_it(self):
            while late:
                late.pop()()

    def say(ahead, *given):
        if ahead._beside.open:
            late.append(partial(Ahead.said, ahead, *given))
        else:
            Ahead.said(ahead, *given)

    base = tiny("llama", num_hidden_layers=7)
    model = EarlyExitModel.from_base(base, ExitConfig("1,4", arch)).eval()
    monkeypatch.setattr("ee_tuning.decode.engine.cuts_beside", lambda *_: [3, 6])
    policy = Threshold(7, {1: 0.9, 4: 0.0}, max_pending=3)
    engine = engine_of(model, [1, 4], True)
    assert engine.sequences.stops == [1, 3, 4, 6, 7]
    expected = written(engine, policy)
    monkeypatch.setattr(Ahead, "said", Ahead._say, raising=False)
    monkeypatch.setattr(Ahead, "_say", say)
    monkeypatch.setattr("ee_tuning.decode.ahead.Beside", Late)
    assert written(engine_of(model, [1, 4], True), policy) == expected
    assert {one[1] for one in expected} == {4, 7}


def test_exits_are_asked_beside_layers_of_few_bytes(monkeypatch):
    """Two of them, where no other exit is that near, and where graphs have branches."""
    model = early_exit()
    assert cuts_beside(model, [1, 3]) == []
    monkeypatch.setattr("ee_tuning.decode.ahead.can_branch", lambda: True)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"), raising=False)
    assert cuts_beside(model, [1, 3, DRAFT]) == []
    assert cuts_beside(model, [1]) == [3]
    assert cuts_beside(model, [1, 2]) == []
    with monkeypatch.context() as patch:
        patch.setattr("ee_tuning.decode.ahead.group_of", lambda layer: "a group")
        assert cuts_beside(model, [1]) == []
    monkeypatch.setattr("ee_tuning.decode.ahead.FEW", 0)
    assert cuts_beside(model, [1]) == []


def kept_of_a_layer_exit(policy, ahead):
    """K of the exit after layer 3 once a text of 7 + 20 tokens is written."""
    engine = engine_of(early_exit(), [1, 2, 3], ahead)
    written(engine, policy, number=20)
    (layer,) = engine.passes.exit_caches[3].slot_layers
    return layer.keys[0, :, : 7 + 19]


def test_a_layer_exit_has_the_kv_of_tokens_that_do_not_ask_it(monkeypatch):
    """Where they may later; else there is no need."""
    monkeypatch.setattr(limits, "plan", lambda paces, rooms, clock: 0)
    policy = Speculative(4, SOME, max_pending=3)
    found, expected = (kept_of_a_layer_exit(policy, ahead) for ahead in (True, False))
    assert torch.equal(found, expected)
    assert expected[:, 7:].all()
    full = kept_of_a_layer_exit(Full(4, max_pending=3), ahead=True)
    assert full[:, :7].all()
    assert not full[:, 7:].any()


ACTED = {
    "none leave": ({1: 0.999, 2: 0.999, 3: 0.999}, 3),
    "some leave": (SOME, 3),
    "all leave": ({1: 0.0, 3: 0.0}, 1),
    "few are asked": ({2: 0.0275}, 7),
}


@pytest.mark.parametrize("arch", ["mlp", "layer"])
@pytest.mark.parametrize("name", ACTED)
def test_captured_steps_read_what_is_there_when_they_run(name, arch, monkeypatch):
    """Captured at the text's beginning, and in its midst, where it has become longer."""
    thresholds, most = ACTED[name]
    model, policy = early_exit(arch=arch), Threshold(4, thresholds, max_pending=most)
    engines = []
    for _ in range(2):
        engine = Engine(model, [1, 2, 3], capacity=CAPACITY, max_pending=most)
        engine.ahead = None
        engines.append(engine)
    engines[0].ahead = Ahead(engines[0].passes, engines[0].sequences.stops)
    act_out(engines[0].passes.graphs, monkeypatch)
    found, expected = ([one[:2] for one in written(engine, policy, 24)] for engine in engines)
    assert found == expected


def operations(model, policy):
    """How many a token alone takes, that no exit lets leave, and with how many tokens at a time."""
    engine, request = engine_of(model, [1, 2, 3], True), Request(prompt(7), policy, 20)
    engine.submit(request)
    engine.step()
    ahead, row = engine.ahead, engine.sequences.live[0]
    ahead.go_on(row, 1)
    asking = ahead._asking(policy, (row.through, row.limit, 20, False), 0)
    with Recorder() as seen, torch.inference_mode():
        for alone, *_ in ahead._steps(asking):
            alone()
    return len(seen.operations)


def test_an_asked_exit_takes_few_operations(monkeypatch):
    """As many as a layer at most, but for what is a layer; more of them change no text."""
    monkeypatch.setattr("ee_tuning.invariant.attention._on_cpu", attend)
    full = operations(early_exit(arch="mlp"), Full(4, max_pending=3))
    found = {}
    for arch in ("norm", "mlp", "layer"):
        policy = Threshold(4, dict.fromkeys([1, 2, 3], 0.999), max_pending=3)
        found[arch] = (operations(early_exit(arch=arch), policy) - full) / 3 / (full / 4)
    assert found["norm"] < 0.7
    assert found["mlp"] < 0.95
    assert found["layer"] < 1.6
    # An engine with layer exits computes nothing of them for a text that never asks.
    assert operations(early_exit(arch="layer"), Full(4, max_pending=3)) == full


def test_captured_rounds_read_what_is_there_when_they_run(monkeypatch):
    monkeypatch.setattr(limits, "plan", lambda paces, rooms, clock: 3)
    policy, texts = Speculative(4, {}, max_pending=3, bar=0.001), []
    for ahead in (True, False):
        engine = engine_of(drafting(), [DRAFT], ahead)
        if ahead:
            act_out(engine.passes.graphs, monkeypatch)
        texts.append([one[:2] for one in written(engine, policy, 24)])
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_compiled_steps_decide_the_same(monkeypatch):
    """Traced as for the compiler, in one piece each as captures need it, but not translated, which
    takes ten times as long."""
    torch._dynamo.reset()  # else what other tests have compiled counts
    traced = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    policy = POLICIES["some leave"]()
    plain = written(engine_of(early_exit(), [1, 2, 3], True), policy)
    found = written(engine_of(early_exit(), [1, 2, 3], True, compile=True), policy)
    assert [one[:2] for one in found] == [one[:2] for one in plain]


@pytest.mark.parametrize("top_k", [0, 5])
def test_samples_are_those_of_the_twin(top_k):
    warp = [TemperatureLogitsWarper(0.7), *([TopKLogitsWarper(top_k)] if top_k else [])]
    policy = POLICIES["some leave"]()
    found, expected = both(early_exit(), [1, 2, 3], policy, seed=5, warp=LogitsProcessorList(warp))
    assert found == expected
    other, _ = both(early_exit(), [1, 2, 3], policy, seed=6, warp=LogitsProcessorList(warp))
    assert other != found


def by_text(engine, requests):
    """Tokens and layers of each."""
    found = {request: [] for request in requests}
    for request, token in engine.stream(requests):
        found[request].append((token.id, token.exit_layer))
    return [*found.values()]


def test_a_text_that_becomes_the_only_one_goes_on_as_it_was():
    """Its pending tokens and what its segments have not computed are taken over."""
    texts = []
    for ahead in (True, False):
        engine = engine_of(early_exit(), [1, 2, 3], ahead, slots=3)
        requests = [
            Request(prompt(length), POLICIES["some leave"](), length + number)
            for length, number in ((9, 11), (5, 50), (4, 3))
        ]
        texts.append(by_text(engine, requests))
    assert texts[0] == texts[1]


@contextmanager
def looks_behind(monkeypatch):
    """Looks that ask for the same, as compiled ones mostly do; what was begun, as (first, number of
    tokens, whether it is behind another)."""
    seen, begin, follow = [], Ahead._begin, Ahead._follow

    def begun(function, behind):
        def called(self, *args):
            look = function(self, *args)
            if look is not None:
                seen.append((look.length, look.number, behind))
            return look

        return called

    with monkeypatch.context() as patch:
        patch.setattr(Ahead, "_reach", lambda *_: CAPACITY)
        patch.setattr(Ahead, "_begin", begun(begin, False))
        patch.setattr(Ahead, "_follow", begun(follow, True))
        yield seen


@pytest.mark.parametrize("name", ["full", "some leave", "all leave", "margin"])
@pytest.mark.parametrize("number", [2, 3, 4, 5, 40])
def test_the_device_is_at_the_next_tokens_while_the_host_looks(name, number, monkeypatch):
    """At no more than there is room for."""
    policy = POLICIES[name]()
    expected = written(engine_of(early_exit(), [1, 2, 3], False), policy, number)
    with looks_behind(monkeypatch) as seen:
        assert written(engine_of(early_exit(), [1, 2, 3], True), policy, number) == expected
    assert [behind for *_, behind in seen] == [False] + [True] * (len(seen) - 1)
    assert [(first, of) for first, of, _ in seen] == [
        (at, min(TOKENS // 2, 7 + number - at)) for at in range(8, 7 + number, TOKENS // 2)
    ]


@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("others", [1, 9])
def test_what_was_begun_is_read_before_another_text_comes(steps, others, monkeypatch):
    """And where the first is alone again, the device is told of it anew."""
    policy, texts, looks = POLICIES["some leave"](), [], []
    for ahead in (True, False):
        engine = engine_of(early_exit(), [1, 2, 3], ahead, slots=2)
        long, short = Request(prompt(7), policy, 50), Request(prompt(5), policy, 5 + others)
        found = {id(long): [], id(short): []}
        with looks_behind(monkeypatch) as seen:
            engine.submit(long)
            for step in itertools.count():
                if step == steps:
                    engine.submit(short)
                for request, token in engine.step():
                    found[id(request)].append((token.id, token.exit_layer, token.confidence))
                if long.finished:
                    break
        texts.append([*found.values()])
        looks.append(seen)
    assert texts[0] == texts[1]
    begun = [first for first, _, behind in looks[0] if not behind]
    assert len(begun) == 2
    assert any(behind for *_, behind in looks[0])


@pytest.mark.parametrize("ends", ["cancelled", "stops"])
def test_the_next_text_in_a_slot_has_nothing_of_what_was_begun_for_the_last(ends, monkeypatch):
    policy = POLICIES["some leave"]()
    expected = written(engine_of(early_exit(), [1, 2, 3], False), policy, length=5)
    engine = engine_of(early_exit(), [1, 2, 3], True)
    stops = {"stops": lambda _, length: length == 10} if ends == "stops" else {}
    first, found = Request(prompt(7), policy, 60, **stops), []
    with looks_behind(monkeypatch) as seen:
        engine.submit(first)
        for _ in range(3):
            engine.step()
        assert engine.ahead._behind is not None  # so this is about something
        if ends == "cancelled":
            engine.cancel(first)
        assert first.finished == (ends == "stops")
        assert seen[-1][2]
        found = written(engine, policy, length=5)
    assert found == expected


@pytest.mark.parametrize("end", [1, 2, TOKENS + 3])
def test_a_text_ends_where_its_stop_is(end):
    engine = engine_of(early_exit(), [1, 2, 3], ahead=True)
    policy = POLICIES["some leave"]()
    expected = [token for token, *_ in written(engine, policy)][:end]
    request = Request(prompt(7), policy, 60, stops=lambda _, length: length == 7 + end)
    events = list(engine.stream([request]))
    assert [token.id for _, token in events] == expected
    assert [token.ends for _, token in events] == [False] * (end - 1) + [True]
    assert not engine.busy


def test_who_is_not_served():
    """Rules of a text's own."""

    class Rule(Threshold):
        def leaves(self, layer, found, ids):
            return len(ids) % 2 == 0

    class Own(Chooser):
        pass

    engine = engine_of(early_exit(), [1, 2, 3], ahead=True)
    plain, processor = Threshold(4, SOME, max_pending=3), lambda ids, scores: scores
    served = {
        Request(prompt(5), Rule(4, SOME, max_pending=3), 9): False,
        Request(prompt(5), plain, 9, Own()): False,
        Request(prompt(5), plain, 9, Chooser([processor])): False,
        Request(prompt(5), plain, 9): True,
        Request(prompt(5), Speculative(4, SOME, max_pending=3), 9): True,
    }
    rows = [engine.sequences.enter(request, 0) for request in served]
    assert [engine.ahead.serves([row]) for row in rows] == [*served.values()]
    assert not engine.ahead.serves(rows[-1:] * 2)


def test_logits_that_are_no_numbers_fail_a_text_behind_what_was_right(monkeypatch):
    engine = engine_of(early_exit(), [1, 2, 3], ahead=True)
    expected = [token for token, *_ in written(engine, Full(4, max_pending=3))]
    seen = []

    def spoilt(state, answers, step):
        seen.append(1)
        if len(seen) > TOKENS + 2:
            answers = torch.stack([answers[0], torch.tensor(torch.nan)])
        _decide(state, answers, step)

    monkeypatch.setattr("ee_tuning.decode.ahead._decide", spoilt)
    request = Request(prompt(7), Full(4, max_pending=3), 60)
    engine.submit(request)
    events = []
    while not request.finished:
        events += engine.step()
    assert [token.id for _, token in events[:-1]] == expected[: 1 + TOKENS + 2]
    assert events[-1] == (request, None)
    assert "not finite" in str(request.error)


@pytest.mark.parametrize("exit", ["draft", "layers", "layers and lookup"])
def test_a_text_rests_ahead_where_drafts_do_not_pay(exit, monkeypatch):
    """And goes on drafting later: the text is that of full depth. What may draft itself is not
    known ahead."""
    lookup = exit == "layers and lookup"
    if exit == "draft":
        model, layers, policy = drafting(), [DRAFT], Speculative(4, {}, max_pending=3, bar=0.0)
    else:
        model, layers = early_exit(), [LOOKUP, 1, 2, 3] if lookup else [1, 2, 3]
        policy = Speculative(4, SOME, max_pending=3, lookup=lookup)
    plans, counts = itertools.cycle([0, 2, 0, 0, 0, 3]), []
    monkeypatch.setattr(limits, "plan", lambda *_: next(plans))
    engine = engine_of(model, layers, ahead=True)
    go_on = engine.ahead.go_on

    def counted(row, count, behind=False):
        counts.append((count, behind))
        return go_on(row, count, behind)

    monkeypatch.setattr(engine.ahead, "go_on", counted)
    with looks_behind(monkeypatch) as seen:
        found = written(engine, policy, 60)
    expected = written(engine_of(model, [], ahead=False), Full(4, max_pending=3), 60)
    assert [token for token, *_ in found] == [token for token, *_ in expected]
    assert any(behind for *_, behind in seen) != lookup
    # What is begun is of use, also where drafts are to come next.
    kept = {first for first, *_ in seen}
    assert len(kept) == len(seen)
    # It is at the next tokens by the time of a look.
    assert {*counts} == {(TOKENS, False)} | (set() if lookup else {(TOKENS // 2, True)})


BARS = {"none stops": 0.0, "some stop": 0.001, "each stops": 0.9}


def drafted(model, bar, ahead, number=40, sampled=False, stops=None):
    """Tokens with their layers and the drafts that they came in the place of."""
    engine = engine_of(model, [DRAFT], ahead)
    warp = LogitsProcessorList([TemperatureLogitsWarper(0.7)] if sampled else [])
    chooser = Chooser(warp, sample=sampled, seed=5 if sampled else None)
    policy = Speculative(4, {}, max_pending=3, bar=bar)
    request = Request(prompt(7), policy, 7 + number, chooser, *([stops] if stops else []))
    return [
        (token.id, token.exit_layer, list(token.rejected)) for _, token in engine.stream([request])
    ]


@pytest.mark.parametrize("bar", BARS.values(), ids=BARS)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("limit", [1, 3])
def test_rounds_have_the_drafts_of_the_twin(bar, sampled, limit, monkeypatch):
    """And keep the same. Near a text's end there are fewer: a round that begins before it is known
    how much is left goes no further than there is room in any case."""
    monkeypatch.setattr(limits, "plan", lambda paces, rooms, clock: limit)
    found, expected = (
        drafted(drafting(), bar, ahead, 48, sampled=sampled) for ahead in (True, False)
    )
    assert found[:40] == expected[:40]
    assert [token for token, *_ in found] == [token for token, *_ in expected]
    if not sampled:
        assert any(layer == DRAFT for _, layer, _ in found)
        assert any(rejected for *_, rejected in found)


@pytest.mark.parametrize("family", ["mistral", "eagle3"])
def test_rounds_of_other_families_and_architectures(family, monkeypatch):
    monkeypatch.setattr(limits, "plan", lambda paces, rooms, clock: 3)
    model = drafting(family)
    found, expected = (drafted(model, 0.0, ahead, 48) for ahead in (True, False))
    assert found[:40] == expected[:40]
    assert [token for token, *_ in found] == [token for token, *_ in expected]


@pytest.mark.parametrize("end", [1, 2, 5, 9])
def test_a_text_ends_within_rounds(end, monkeypatch):
    """What the device has written behind the end is not the text's."""
    monkeypatch.setattr(limits, "plan", lambda paces, rooms, clock: 3)
    whole = drafted(drafting(), 0.0, ahead=True)
    found = drafted(drafting(), 0.0, ahead=True, stops=lambda _, length: length == 7 + end)
    assert [token for token, *_ in found] == [token for token, *_ in whole[:end]]


def test_a_text_with_drafts_that_becomes_the_only_one_goes_on_as_it_was(monkeypatch):
    monkeypatch.setattr(limits, "plan", lambda paces, rooms, clock: 3)
    texts = []
    for ahead in (True, False):
        engine = engine_of(drafting(), [DRAFT], ahead, slots=3)
        policy = Speculative(4, {}, max_pending=3, bar=0.0)
        sizes = ((9, 11), (5, 50), (4, 3))
        texts.append(
            by_text(engine, [Request(prompt(one), policy, one + more) for one, more in sizes])
        )
    assert texts[0] == texts[1]


def test_another_text_comes_while_a_round_is_under_way(monkeypatch):
    """What the device has begun is read first, and the texts are those that they are alone."""
    plans = itertools.cycle([3, 2, 1, 3, 3])
    monkeypatch.setattr(limits, "plan", lambda *_: next(plans))
    policy, model = Speculative(4, {}, max_pending=3, bar=0.0), drafting()
    alone = [written(engine_of(model, [DRAFT], False), policy, 40, length=one) for one in (7, 9)]
    engine = engine_of(model, [DRAFT], ahead=True, slots=2)
    rounds, seen = engine.ahead.rounds, []
    requests = [Request(prompt(length), policy, length + 40) for length in (7, 9)]
    texts = {request: [] for request in requests}
    engine.submit(requests[0])
    late = requests[1]
    while not all(request.finished for request in requests):
        for request, token in engine.step():
            texts[request].append(token.id)
        live = engine.sequences.live
        seen.append((len(live), bool(live) and rounds.underway(live[0])))
        if len(texts[requests[0]]) > 12 and late is not None:
            engine.submit(late)
            late = None
    assert [*texts.values()] == [[token for token, *_ in text] for text in alone]
    assert {(1, True), (2, False), (1, False)} == {*seen} - {(0, False)}


@pytest.mark.parametrize("which", [range(6, 99), [6]], ids=["all", "one"])
def test_no_numbers_within_rounds_fail_a_text_behind_what_was_right(which, monkeypatch):
    monkeypatch.setattr(limits, "plan", lambda paces, rooms, clock: 3)
    engine = engine_of(drafting(), [DRAFT], ahead=True)
    settle, seen = engine.ahead.rounds._settle, []

    def spoilt(*given):
        seen.append(1)
        *others, answers = given
        if len(seen) in which:
            answers = torch.stack([answers[0], torch.full_like(answers[1], torch.nan)])
        settle(*others, answers)

    engine.ahead.rounds._settle = spoilt
    request = Request(prompt(7), Speculative(4, {}, max_pending=3, bar=0.0), 67)
    engine.submit(request)
    events = [event for _ in range(9) for event in engine.step()]
    expected = [token for token, *_ in drafted(drafting(), 0.0, ahead=False, number=60)]
    tokens = [token.id for _, token in events if token is not None]
    assert 4 < len(tokens) < 60
    assert tokens == expected[: len(tokens)]
    assert events[-1] == (request, None)
    assert "not finite" in str(request.error)


def several(ahead, sampled, alone=False):
    """By text, the tokens of five texts of different lengths in three slots at full depth."""
    engine = engine_of(early_exit(), [], ahead, slots=1 if alone else 3)
    warp = LogitsProcessorList([TemperatureLogitsWarper(0.8)] if sampled else [])
    requests = [
        Request(
            prompt(5 + i, i),
            Full(4, max_pending=3),
            12 + 7 * i,
            Chooser(warp, sample=sampled and i != 1, seed=i if sampled and i != 1 else None),
            stops=lambda _, length: length == 20,
        )
        for i in range(5)
    ]
    found = {id(request): [] for request in requests}
    for request, token in engine.stream(requests):
        found[id(request)].append((token.id, token.exit_layer, token.confidence, token.ends))
    return list(found.values())


def counted(monkeypatch):
    """Of each look at rows that go straight to the end, their number and that of tokens."""
    counts, go_on = [], Several.go_on

    def count(several, rows, number, *how, **named):
        counts.append((len(rows), number))
        return go_on(several, rows, number, *how, **named)

    monkeypatch.setattr(Several, "go_on", count)
    return counts


@pytest.mark.parametrize("sampled", [False, True])
def test_several_texts_go_on_by_several_tokens(sampled, monkeypatch):
    """Those of a look of the host behind a text's end are lost; texts are what they are alone."""
    counts = counted(monkeypatch)
    found = several(True, sampled)
    assert (3, TOKENS) in counts
    assert found == several(False, sampled)
    assert (3, 1) in counts
    monkeypatch.setattr(Several, "serves", lambda *_: False)
    assert found == several(False, sampled) == several(False, sampled, alone=True)
    assert [len(text) for text in found] == [7, 13, 13, 12, 11]


def at_full_depth(number):
    """Requests of texts that end one after another."""
    return [Request(prompt(5 + i, i), Full(4, max_pending=3), 45 + i) for i in range(number)]


def test_the_next_tokens_of_several_are_begun_before_these_are_read(monkeypatch):
    """Not where one of them ends, or another text waits for a free slot."""
    began, follow, model = [], Several._follow, early_exit()

    def followed(*given):
        began.append(behind := follow(*given))
        return behind

    monkeypatch.setattr(Several, "_follow", followed)
    alone = by_text(engine_of(model, [], False), at_full_depth(3))
    engine, (*new, late) = engine_of(model, [], True, slots=3), at_full_depth(3)
    found = {request: [] for request in [*new, late]}
    for request in new:
        engine.submit(request)
    for number in range(40):
        if number == 4:
            assert engine.several.underway(engine.sequences.live)
            engine.submit(late)
        before = len(began)
        for request, token in engine.step():
            found[request].append((token.id, token.exit_layer))
        if number == 4:  # what was begun is read, and nothing follows it
            assert (len(began), found[late]) == (before, [])
            assert not engine.several.underway(engine.sequences.live)
    assert began[0] is not None
    assert began.count(None) == 1  # of the two that are there when the first one has ended
    assert [*found.values()] == alone


@pytest.mark.parametrize(("token", "one_by_one"), [(1.9, False), (2.1, True)])
def test_tokens_that_take_the_device_long_are_looked_at_one_by_one(token, one_by_one, monkeypatch):
    """From a look behind another on, since then it is known; the texts stay what they are."""
    begun, begin, learn = [], Look.begun, Timing.learn
    model = early_exit()
    alone = by_text(engine_of(model, [], False), at_full_depth(3))

    def count(look):
        begun.append(look.number)
        return begin(look)

    monkeypatch.setattr(Look, "begun", count)
    monkeypatch.setattr(Timing, "learn", lambda timing, *_: learn(timing, 1.0, token))
    assert by_text(engine_of(model, [], True, slots=3), at_full_depth(3)) == alone
    assert begun[:3] == [TOKENS // 2] * 3
    assert begun.count(1) > 30 if one_by_one else begun.count(1) <= 3  # of what texts have left
    assert {*begun} == {TOKENS // 2, 1}


def test_what_the_host_takes_is_from_one_reading_to_the_next(monkeypatch):
    """The look that is begun in between is part of it, to wait for the device is not."""
    now, learned, begin, ask = [0.0], [], Look.begun, Look.read

    def count(look):
        now[0] += 10
        return begin(look)

    def read(look):
        now[0] += 1000
        return ask(look)[0], 4.0 * look.number

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("ee_tuning.decode.straight.time", clock)
    monkeypatch.setattr(Look, "begun", count)
    monkeypatch.setattr(Look, "read", read)
    monkeypatch.setattr(Timing, "learn", lambda _, *given: learned.append(given))
    engine = engine_of(early_exit(), [], True, slots=3)
    for request in at_full_depth(3):
        engine.submit(request)
    while engine.busy:
        engine.step()
        now[0] += 1
    assert {*learned} == {(11.0, 4.0)}
    assert len(learned) > 10


def test_a_look_or_two_that_took_long_change_nothing():
    timing = Timing()
    for late in (0.0, 5.0, 0.0, 5.0, 0.0):
        timing.learn(0.001 + late, 0.01)
    assert timing.number(TOKENS, True) == 1
    assert timing.number(TOKENS, False) == TOKENS  # the device is asked for them at once
    for late in [0.0, 5.0, 0.0, 0.0] * 10:
        timing.learn(0.009, 0.01 + late)
    assert timing.number(TOKENS, True) == TOKENS // 2
    for _ in range(Timing.LATELY):
        timing.learn(0.001, 0.01)
    assert timing.number(TOKENS, True) == 1


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("number", [1, 3])
def test_steps_in_and_out_of_inference_mode_take_turns(inside, number):
    engine, texts = engine_of(early_exit(), [], True, slots=number), []
    for mode in (inside, not inside, inside):
        with torch.inference_mode(mode):
            texts.append(by_text(engine, at_full_depth(number)))
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("number", [1, 2])
def test_a_text_that_came_when_the_last_ones_end_keeps_the_engine_busy(number, monkeypatch):
    """It has no slot yet, since the device was at them; whoever steps must know of it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    engine = engine_of(early_exit(), [], True, slots=3, compile=True)
    others = [Request(prompt(5, i), POLICIES["full"](), 20) for i in range(number)]
    late = Request(prompt(6, 9), POLICIES["full"](), 9)
    for request in others:
        engine.submit(request)
    engine.step()
    while max(row.left for row in engine.sequences.live) > 2:
        engine.step()
    assert drafts.underway(engine.sequences.live, engine.several, engine.ahead)
    engine.submit(late)
    engine.step()
    assert not engine.sequences.live
    assert engine.busy
    for _ in range(20):
        engine.step()
    assert late.finished
    assert not engine.busy


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("more", [1, 5])
@pytest.mark.parametrize("kind", ["full", "leaves", "drafts", "rests"])
def test_prompts_are_not_written_over_what_the_device_is_at(kind, more, number, monkeypatch):
    """Compiled passes of prompts are filled with slots that are idle: of the two that come, which
    have so many tokens more, with those of the texts there are."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    plans = itertools.cycle([0, 0, 0, 2, 2] if kind == "rests" else [2])
    monkeypatch.setattr(limits, "plan", lambda *_: next(plans))
    drafts_itself = kind in ("drafts", "rests")
    model, layers = (drafting(), [DRAFT]) if drafts_itself else (early_exit(), [])
    layers = [1, 2, 3] if kind == "leaves" else layers
    policy = POLICIES["some leave" if kind == "leaves" else "full"]
    if drafts_itself:
        policy = partial(Speculative, 4, {}, max_pending=3, bar=0.0)

    def requests():
        return [Request(prompt(5 + i, i), policy(), 50 + i) for i in range(number)]

    alone = by_text(engine_of(model, layers, False, drafts=drafts_itself), requests())
    engine = engine_of(model, layers, True, slots=5, compile=True, drafts=drafts_itself)
    new, seen, came = requests(), [], 0
    found = {request: [] for request in new}
    for request in new:
        engine.submit(request)
    while not all(request.finished for request in new):
        live = engine.sequences.live
        seen.append(drafts.underway(live, engine.several, engine.ahead))
        if seen[-1] and came < 6 and len(live) == number:
            for place in range(2):
                # Beside one that is not verified they would rest.
                way = policy if drafts_itself else POLICIES["full"]
                late = Request(prompt(6, came + place), way(), 6 + more)
                engine.submit(late)
            came += 2
        for request, token in engine.step():
            found.setdefault(request, []).append((token.id, token.exit_layer))
    texts = [found[request] for request in new]
    if kind == "rests":  # plans come at other times
        texts, alone = ([[token for token, _ in text] for text in some] for some in (texts, alone))
    assert texts == alone
    # Of several that do not go straight to the end the host looks at each token.
    assert any(seen) or (number > 1 and kind not in ("full", "rests"))


def test_a_text_without_a_number_fails_alone_at_full_depth(monkeypatch):
    engine = engine_of(early_exit(), [], True, slots=2)
    requests = [Request(prompt(5, i), Full(4, max_pending=3), 25) for i in range(2)]
    for request in requests:
        engine.submit(request)
    events, read = engine.step(), straight.Look.read

    def broken(look):
        found, seconds = read(look)
        found[1][1][0] = float("nan")  # the second token of the first text
        return found, seconds

    monkeypatch.setattr(straight.Look, "read", broken)
    events += engine.step()
    monkeypatch.undo()
    good = [token for request, token in events if request is requests[0]]
    assert len(good) == 2
    assert None not in good
    monkeypatch.setattr(straight.Look, "read", lambda _: ([[[5, 5], [float("nan"), 1.0]]], 0.0))
    assert (requests[0], None) in engine.step()
    assert "not finite" in str(requests[0].error)
    assert not requests[1].finished


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("number", [1, 3])
def test_texts_rest_by_several_tokens_and_draft_later(number, most, sampled, monkeypatch):
    """As many in a look of the host as at full depth, and as the draft exit can compute at once;
    the pace of each is told. Drafts are those of a plain loop, texts those of full depth."""
    plans = itertools.cycle([0, 0, 0, most, most])  # the first one reads what is underway
    model, seen, looks = drafting(), [], []
    draft, rest = Row.draft, Pace.rest

    def drafted(row, found):
        seen.append((list(row.ids), [one.id for one in found]))
        draft(row, found)

    monkeypatch.setattr(limits, "plan", lambda *_: next(plans))
    monkeypatch.setattr(Row, "draft", drafted)
    monkeypatch.setattr(Pace, "rest", lambda pace, one: looks.append(one) or rest(pace, one))
    warp = [TemperatureLogitsWarper(0.7)] if sampled else []
    texts = []
    for layers in ([DRAFT], []):
        engine = Engine(model, layers, slots=number, capacity=CAPACITY, max_pending=most)
        engine.ahead = Ahead(engine.passes, engine.sequences.stops)
        policy = Speculative(4, {}, max_pending=most, bar=0.0) if layers else Full(4)
        policy.max_pending = most
        requests = [
            Request(prompt(5 + i, i), policy, 65 + i, Chooser(warp, sample=sampled, seed=i))
            for i in range(number)
        ]
        texts.append([[token for token, _ in text] for text in by_text(engine, requests)])
    assert texts[0] == texts[1]
    # The device is at as many more by the time of a look.
    assert max(looks) == max(1, min(TOKENS, 1 + most) // 2)
    assert any(found for _, found in seen)
    for text, own in seen if not sampled else ():
        if own:
            _, (first, *_) = draft_loop(
                model, text[:-1], len(own) + 2, len(own), 0.0, "probability"
            )
            assert own == first.drafts


def test_texts_rest_beside_those_at_full_depth(monkeypatch):
    """Whatever drafts promise; not where its own text may have drafts."""
    counts, model = counted(monkeypatch), drafting()
    ways = [Full(4, max_pending=3), Speculative(4, {}, max_pending=3, bar=0.0)]
    alone = written(engine_of(model, [], ahead=False), ways[0], 30)
    for most, lookup, expected in (
        (0, False, {(2, TOKENS)}),
        (3, False, {(2, TOKENS)}),
        (0, True, set()),
    ):
        counts.clear()
        monkeypatch.setattr(limits, "plan", lambda *_, most=most: most)
        ways[1].lookup = lookup
        engine = engine_of(model, [LOOKUP, DRAFT], ahead=True, slots=2)
        texts = by_text(engine, [Request(prompt(7), way, 37) for way in ways])
        assert [[token for token, _ in text] for text in texts] == [[one[0] for one in alone]] * 2
        assert {*counts} == expected


@pytest.mark.parametrize(
    ("bindings", "there", "can"),
    [(12080, 13000, True), (12060, 13000, False), (13000, 12040, False)],
)
def test_graphs_have_branches_if_driver_and_bindings_know_them(bindings, there, can, monkeypatch):
    fake = SimpleNamespace(CUDA_VERSION=bindings, cuDriverGetVersion=lambda: (0, there))
    monkeypatch.setattr(branches, "driver", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert branches.can_branch() is can
