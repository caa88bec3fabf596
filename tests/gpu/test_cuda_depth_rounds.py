"""Rounds in which an exit at a layer drafts on a GPU: those of the twin, and one wait for each."""

import pytest
import torch
from helpers.families import tiny
from helpers.prompts import prompt

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.decode import Chooser, Engine, Full, Request, Speculative
from ee_tuning.decode.rounds import Line

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MOST = 3


@pytest.fixture(autouse=True)
def _as_many_as_may_be(monkeypatch):
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda paces, rooms, clock: MOST)


def half_right(arch):
    """In fp32, so that rounding does not turn a token: the end agrees with an exit now and then."""
    model = EarlyExitModel.from_base(tiny("qwen3").cuda(), ExitConfig("2", arch)).eval()
    own = [model.exit(2).block] if arch == "layer" else []
    for layer in [*list(model.backbone.layers)[2:], *own]:
        for p in layer.parameters():
            p.data.mul_(0.3 if p.dim() >= 2 else 1)
    return model


def engine_of(model, layers, compile=True):
    return Engine(model, layers, capacity=300, max_pending=MOST, compile=compile)


def policy_of(threshold):
    return Speculative(4, {2: threshold}, max_pending=MOST)


def written(engine, policy, sampled=False):
    chooser = Chooser(sample=sampled, seed=5 if sampled else None)
    return [token for _, token in engine.stream([Request(prompt(7), policy, 290, chooser)])]


def told(tokens):
    return [(token.id, token.exit_layer, list(token.rejected)) for token in tokens]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("arch", ["norm", "mlp", "layer"])  # a minute or more each
def test_rounds_are_those_of_plain_passes(arch, sampled):
    """With drafts of all tokens, of some and of none; the text is that of full depth."""
    model = half_right(arch)
    device, plain = engine_of(model, [2]), engine_of(model, [2], compile=False)
    assert device.ahead is not None
    plain.ahead = None
    full = [token.id for token in written(engine_of(model, []), Full(4, max_pending=MOST), sampled)]
    every = written(plain, policy_of(0.0), sampled)
    sures = sorted(token.confidence for token in every if token.exit_layer == 2)
    some = sures[len(sures) // 2] + 1e-6
    for threshold in (0.0, some, 0.999):
        expected = written(plain, policy_of(threshold), sampled)
        found = written(device, policy_of(threshold), sampled)
        assert told(found) == told(expected)
        assert [token.id for token in found] == full
        sure = [token.confidence for token in expected]
        assert [token.confidence for token in found] == pytest.approx(sure, rel=1e-4)
        assert any(token.exit_layer == 2 for token in found) == (threshold < 0.9)
    assert any(key[0] == "rounds" for key in device.passes.graphs._kept)
    assert any(token.rejected for token in every)


def test_the_host_waits_once_a_round(monkeypatch):
    """For its line, and for nothing else; and the next round has begun by then."""
    engine, reads, tokens = engine_of(half_right("mlp"), [2]), [], []
    read = Line.read

    def counted(line):
        (row,) = engine.sequences.live
        reads.append(row)
        return read(line)

    monkeypatch.setattr(Line, "read", counted)
    request = Request(prompt(7), policy_of(0.0), 290)
    engine.submit(request)
    for _ in range(6):  # the prompt, and what is captured
        engine.step()
    captured, rounds = len(engine.passes.graphs), engine.ahead.rounds
    reads.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 21):
            tokens += engine.step()
            assert len(reads) == number
            assert rounds.underway(engine.sequences.live[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(engine.passes.graphs) == captured
    assert sum(token.exit_layer == 4 for _, token in tokens) == 20
    assert len(tokens) > 20


def test_what_is_warm_is_all_that_texts_ask_for():
    engine = engine_of(half_right("mlp"), [2])
    engine.warm_up()
    warm = len(engine.passes.graphs)
    for threshold in (0.0, 0.999):
        written(engine, policy_of(threshold))
    assert len(engine.passes.graphs) == warm
