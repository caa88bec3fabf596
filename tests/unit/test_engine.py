"""The engine can be fed, goes on whatever one request does, and is shared by threads."""

import gc
import queue
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from helpers.families import tiny
from helpers.models import DEPTH, drafting, early_exit
from helpers.prompts import prompt

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.decode import (
    Chooser,
    Engine,
    Fixed,
    Full,
    Request,
    Speculative,
    Threshold,
    engines_of,
)
from ee_tuning.parallel.mesh import Mesh


def tokens_of(events, request):
    return [token.id for one, token in events if one is request and token is not None]


def run(engine):
    """Events until there is nothing left to do."""
    events = []
    while step := engine.step():
        events += step
    return events


def alone(request, slots=1):
    """The tokens of a request like this in an engine of its own."""
    engine = Engine(early_exit(), [1, 2, 3], slots=slots, capacity=64)
    copied = Request(request.ids, request.policy, request.max_length)
    return [token.id for _, token in engine.stream([copied])]


def test_a_request_gets_its_first_token_while_others_go_on():
    """With a free slot and an idle queue it waits for nothing but the round in progress."""
    engine = Engine(early_exit(), [1, 2, 3], slots=3, capacity=64)
    first = Request(prompt(5), Threshold(DEPTH, {1: 0.02}), 30)
    second = Request(prompt(4, 1), Speculative(DEPTH, {2: 0.0}), 12)
    third = Request(prompt(6, 2), Full(DEPTH), 20)
    assert engine.step() == []
    engine.submit(first)
    events = engine.step()
    assert [request for request, _ in events] == [first]
    events += engine.step()
    for request in (second, third):
        engine.submit(request)
        (event,) = engine.step()
        assert event[0] is request
        events += [event, *engine.step()]
    events += run(engine)
    for request in (first, second, third):
        found = tokens_of(events, request)
        assert found == alone(request)
        assert len(found) == request.max_length - len(request.ids)
        assert request.finished
        assert [token.ends for one, token in events if one is request][-1]
    assert not engine.busy


def test_a_slow_source_of_requests_holds_up_nobody():
    """One thread steps, another submits when it likes: here after the first has decoded."""
    engine, submitted = Engine(early_exit(), [1], slots=2, capacity=64), queue.Queue()
    early, late = (Request(prompt(4, i), Full(DEPTH), 44) for i in range(2))

    def client():
        engine.submit(early)
        submitted.get(timeout=30)
        engine.submit(late)

    thread = threading.Thread(target=client)
    thread.start()
    events, waited = [], None
    deadline = time.monotonic() + 60
    while not (early.finished and late.finished):
        assert time.monotonic() < deadline
        new = engine.step()
        events += new
        if len(tokens_of(events, early)) == 9 and waited is None:
            submitted.put(None)
            waited = len(events)
            thread.join()
    order = [request for request, _ in events]
    assert order.index(late) <= waited + 1
    assert tokens_of(events, early) == alone(early)
    assert tokens_of(events, late) == alone(late)


def test_a_request_that_does_not_fit_is_refused_alone():
    engine = Engine(early_exit(), [1, 2, 3], slots=2, capacity=64)
    good = [Request(prompt(4, i), Full(DEPTH), 20) for i in range(2)]
    engine.submit(good[0])
    engine.step()
    with pytest.raises(UserError, match="there is room for 64"):
        engine.submit(Request([1], Full(DEPTH), 65))
    engine.submit(good[1])
    events = run(engine)
    assert all(request.finished and request.error is None for request in good)
    assert tokens_of(events, good[1]) == alone(good[1])


class Failing(Chooser):
    """Fails when asked for its `at`-th token, as a client's processor may."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def choose(self, found):
        self.left -= 1
        if self.left < 0:
            raise ValueError("a mistake of the client's")
        return super().choose(found)


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("policy", [Full(DEPTH), Speculative(DEPTH, {1: 0.0})])
def test_a_request_that_fails_ends_alone(at, policy):
    """Its event has no token, its slot is free, and the others' texts are what they are alone."""
    engine = Engine(early_exit(), [1, 2, 3], slots=2, capacity=64)
    good = [Request(prompt(4, i), Full(DEPTH), 20) for i in range(3)]
    bad = Request(prompt(5, 7), policy, 30, Failing(at))
    for request in (good[0], bad, *good[1:]):
        engine.submit(request)
    events = run(engine)
    assert isinstance(bad.error, ValueError)
    assert [token for request, token in events if request is bad][-1] is None
    assert bad.finished
    for request in good:
        assert tokens_of(events, request) == alone(request)


def test_what_ends_a_text_may_fail_too():
    def stops(ids, length):
        raise KeyError("no such stop")

    engine = Engine(early_exit(), [1], slots=2, capacity=64)
    bad, good = Request(prompt(3), Full(DEPTH), 9, stops=stops), Request(prompt(4), Full(DEPTH), 9)
    engine.submit(bad)
    engine.submit(good)
    events = run(engine)
    assert isinstance(bad.error, KeyError)
    assert tokens_of(events, good) == alone(good)
    with pytest.raises(KeyError):
        list(engine.stream([Request(prompt(3), Full(DEPTH), 9, stops=stops)]))
    assert not engine.busy


def test_a_request_with_a_seed_of_its_own_says_the_same_beside_others():
    """Whatever else is sampled, before and meanwhile."""

    def sampling(seed, ids):
        return Request(ids, Full(DEPTH), 20, Chooser(sample=True, seed=seed))

    engine, found = Engine(early_exit(), [1], slots=3, capacity=64), []
    for others in range(3):
        request = sampling(7, prompt(4))
        for one in (*(sampling(None, prompt(5, i)) for i in range(others)), request):
            engine.submit(one)
        found.append(tokens_of(run(engine), request))
    assert found[0] == found[1] == found[2]
    other = sampling(8, prompt(4))
    engine.submit(other)
    assert tokens_of(run(engine), other) != found[0]


def test_rejected_drafts_come_with_the_token_in_their_place():
    """Drafts of a first exit that knows nothing, and how many of them there were."""
    engine = Engine(early_exit(), [1], slots=1, capacity=64, max_pending=3)
    request = Request(prompt(5), Speculative(DEPTH, {1: 0.0}, max_pending=3), 40)
    tokens = [token for _, token in engine.stream([request])]
    assert any(token.rejected for token in tokens)
    assert not any(token.rejected for token in tokens if token.exit_layer != DEPTH)
    assert all(token.rejected[0] != token.id for token in tokens if token.rejected)


def test_a_cancelled_request_says_no_more_and_frees_its_slot():
    """Whether it is in progress or still waits."""
    engine = Engine(early_exit(), [1], slots=1, capacity=64)
    requests = [Request(prompt(4, i), Full(DEPTH), 20) for i in range(3)]
    for request in requests:
        engine.submit(request)
    events = engine.step() + engine.step()
    engine.cancel(requests[0])
    engine.cancel(requests[1])
    events += run(engine)
    assert [len(tokens_of(events, request)) for request in requests] == [2, 0, 16]


class Uncertain(Threshold):
    """A token leaves by chance."""

    def __init__(self, layers, share, seed):
        super().__init__(DEPTH, dict.fromkeys(layers, 0.5), max_pending=8)
        self._share, self._chance = share, random.Random(seed)

    def leaves(self, layer, found, ids):
        return self._chance.random() < self._share


@pytest.mark.parametrize("layers", [[1], [2], [1, 2, 3]])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_texts_beside_each_other_take_no_more_passes_than_at_full_depth(layers, share, monkeypatch):
    """Nor than if the shallowest door were opened always; each says what it says alone."""
    new, rows, counts, texts = 40, 16, [], []
    for number, shallowest in ((rows, False), (rows, True), (1, False)):
        engine = Engine(early_exit(), layers, slots=number, capacity=64, max_pending=8)
        sequences, passes = engine.sequences, []
        if shallowest:
            monkeypatch.setattr(sequences, "next_door", lambda rows: min(row.door for row in rows))
        advance, stops = sequences.advance, [0, *sequences.stops]

        def counted(door, standing, advance=advance, stops=stops, passes=passes):
            passes.append(stops[door + 1] - stops[door])
            return advance(door, standing)

        monkeypatch.setattr(sequences, "advance", counted)
        requests = [
            Request(prompt(5, i), Uncertain(layers, share, i), 5 + new) for i in range(rows)
        ]
        found = {request: [] for request in requests}
        for request, token in engine.stream(requests):
            found[request].append((token.id, token.exit_layer))
        texts.append([*found.values()])
        counts.append(sum(passes) / new)
    assert texts[0] == texts[1] == texts[2]
    # At the end there are a few rows left.
    assert counts[0] < min(1.1 * DEPTH, counts[1] * 0.95)


@pytest.mark.parametrize("kind", [Full, Speculative])
def test_who_leaves_early_keeps_nobody_waiting(kind):
    """Texts at full depth, and such as draft nothing beside it, go on as if they were alone."""
    exits, new, rows, counts = {1: 0.0, 2: 0.0}, 20, 8, []
    policy = kind(DEPTH) if kind is Full else kind(DEPTH, exits, max_pending=8)
    for beside in ([], [Threshold(DEPTH, exits, max_pending=8)]):
        engine = Engine(early_exit(), [1, 2], slots=rows + 1, capacity=400, max_pending=8)
        requests = [Request(prompt(5, i), policy, 5 + new) for i in range(rows)]
        others = [Request(prompt(5, 9), one, 390) for one in beside]
        advance, passes = engine.sequences.advance, []

        def counted(door, standing, advance=advance, passes=passes):
            passes.append(door)
            return advance(door, standing)

        engine.sequences.advance = counted
        if kind is Speculative:  # also where it is alone
            engine._pace = lambda _: None
        for one in (*requests, *others):
            engine.submit(one)
        while not all(one.finished for one in requests):
            engine.step()
        counts.append(len(passes))
    assert counts[1] < 1.5 * counts[0]


@pytest.mark.parametrize(
    "policy", [Full(DEPTH), Fixed(2), Threshold(DEPTH, {1: 0.0}), Speculative(DEPTH, {1: 0.0})]
)
def test_a_text_that_ends_at_an_exit_starves_nobody(policy):
    engine = Engine(early_exit(), [1, 2], slots=2, capacity=64, max_pending=8)
    requests = [Request(prompt(5, i), one, 45) for i, one in enumerate([Fixed(1), policy])]
    for request in requests:
        engine.submit(request)
    events = []
    while not any(request.finished for request in requests):
        events += engine.step()
    assert min(len(tokens_of(events, request)) for request in requests) > 20


@dataclass
class Patient(Threshold):
    """Leaves where an exit says what the one before it said: it remembers, for each sequence."""

    said: list[tuple[int, int]] = field(default_factory=list)

    def start(self):
        return Patient(self.end, self.thresholds, self.measure, self.max_pending)

    def leaves(self, layer, found, ids):
        agrees = (len(ids), found.token) in self.said
        self.said.append((len(ids), found.token))
        return agrees


def test_a_policy_may_remember_something_for_each_sequence():
    policy = Patient(DEPTH, dict.fromkeys([1, 2, 3], 0.0))
    requests = [Request(prompt(4 + i, i), policy, 24) for i in range(3)]
    engine = Engine(early_exit(), [1, 2, 3], slots=3, capacity=64)
    events = list(engine.stream(requests))
    for request in requests:
        assert tokens_of(events, request) == alone(request)
    assert policy.said == []
    assert {token.exit_layer for _, token in events} > {DEPTH}


# -- engines of a model ----------------------------------------------------------------------------


def small_model(arch="mlp"):
    return EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,3", arch=arch)).eval()


@pytest.mark.parametrize("arch", ["mlp", "layer"])
def test_threads_that_generate_on_one_model_get_their_own_texts(arch):
    """Eight of them, in different ways and sizes, some as batches that are read between rounds."""
    model = small_model(arch)
    ways = [{"threshold": 0.02}, {"mode": "full"}, {"mode": "speculative", "threshold": 0.0}]
    calls = [
        {"ids": prompt(2 + i % 5, i), "max_new_tokens": 4 + i % 7, **ways[i % 3]} for i in range(24)
    ]

    def text(call):
        settings = {"eos_token_id": None} | call
        ids = settings.pop("ids")
        if len(ids) % 2:
            ((_, out),) = model.generate_batch([ids], slots=2, capacity=32, **settings)
        else:
            out = model.generate(torch.tensor([ids]), **settings)
        return out.sequences.tolist(), out.exit_layers.tolist()

    expected = [text(call) for call in calls]
    engines_of(model).clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(text, calls * 2))
    assert found == expected * 2
    assert len(engines_of(model).kept) <= 4


def test_a_call_within_a_call_has_an_engine_of_its_own():
    model, ids, inner = small_model(), torch.tensor([[5, 9, 11]]), []
    common = {"max_new_tokens": 6, "eos_token_id": None, "threshold": 0.02}
    expected = model.generate(ids, **common).sequences
    out = model.generate(
        ids, on_token=lambda *_: inner.append(model.generate(ids, **common).sequences), **common
    )
    assert all(torch.equal(one, expected) for one in [out.sequences, *inner])


def test_engines_live_no_longer_than_their_model():
    model = small_model()
    model.generate(torch.tensor([[5, 9]]), max_new_tokens=4, threshold=0.02)
    (engine,) = map(weakref.ref, engines_of(model).kept.values())
    del model
    gc.collect()
    assert engine() is None


def test_engines_are_gone_when_processes_part(tmp_path):
    """NCCL would wait for graphs that have captured its sums."""
    early_exit().model.save_pretrained(tmp_path / "base")
    EarlyExitModel.from_base(str(tmp_path / "base"), ExitConfig("1")).save_pretrained(
        tmp_path / "x"
    )
    mesh = Mesh()
    with mesh.connected(torch.device("cpu"), 1.0):
        model = EarlyExitModel.from_pretrained(str(tmp_path / "x"), mesh=mesh)
        model.generate(torch.tensor([prompt(4)]), max_new_tokens=2)
        (engine,) = map(weakref.ref, engines_of(model).kept.values())
        assert engine() is not None
    assert engine() is None


@pytest.mark.parametrize("kind", ["layers", "draft"])
def test_a_slot_of_a_text_that_failed_is_as_good_as_new(kind):
    """Even if what is in it is no number."""
    model, layers = (early_exit(), [1, 2, 3]) if kind == "layers" else (drafting(), [0])
    leaving = {"bar": 0.0} if kind == "draft" else {"thresholds": {1: 0.0, 3: 0.0}}
    policy = Speculative(4, max_pending=3, **leaving)
    engine, fresh = (Engine(model, layers, capacity=64, max_pending=3) for _ in range(2))

    def fails(ids, length):
        if length == 12:
            passes = engine.passes
            caches = [*passes.caches, *passes.exit_caches.values()]
            caches += [passes.chains.cache] if passes.chains else []
            for layer in (layer for cache in caches for layer in cache.slot_layers):
                layer.keys.fill_(torch.nan)
                layer.values.fill_(torch.nan)
            raise RuntimeError("as a stop of the caller's may")
        return False

    with pytest.raises(RuntimeError):
        list(engine.stream([Request(prompt(9), policy, 40, stops=fails)]))
    found, expected = (
        [token.id for _, token in one.stream([Request(prompt(5), policy, 40)])]
        for one in (engine, fresh)
    )
    assert found == expected
