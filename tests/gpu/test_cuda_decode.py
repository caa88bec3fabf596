"""Decoding on a GPU: captured graphs give the tokens of plain passes."""

import random

import pytest
import torch
from helpers.families import tiny
from helpers.lookups import let_texts_draft, repeating
from helpers.models import drafting
from helpers.prompts import prompt

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.decode import Chooser, Engine, Fixed, Full, Request, Speculative, Threshold
from ee_tuning.decode.lookup import MATCH, Limits
from ee_tuning.decode.together import Together
from ee_tuning.exit_config import DRAFT, LOOKUP

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])  # a minute or more each
def test_graphs_give_the_tokens_of_plain_passes(family):
    """In fp32, so that rounding does not turn a token: batches, all modes, rings written over."""
    exits = ExitConfig("1,2,3", "mlp,layer,norm")
    model = EarlyExitModel.from_base(tiny(family).cuda(), exits).eval()
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) >= torch.tensor([[4], [6], [0]])).long()
    common = {
        "attention_mask": mask.cuda(), "max_new_tokens": 24, "eos_token_id": None, "max_pending": 3,
    }  # fmt: skip
    expected = model.model.generate(
        ids.cuda(), attention_mask=mask.cuda(), do_sample=False, max_new_tokens=24,
        eos_token_id=None,
    )  # fmt: skip
    for mode, threshold in (("full", 1.0), ("threshold", 0.02), ("speculative", 0.0)):
        way = {"mode": mode, "threshold": threshold, "exit_layers": [1, 3]}
        plain = model.generate(ids.cuda(), compile=False, **way, **common)
        found = model.generate(ids.cuda(), compile=True, **way, **common)
        again = model.generate(ids.cuda(), compile=True, **way, **common)
        assert torch.equal(found.sequences, plain.sequences)
        assert torch.equal(found.exit_layers, plain.exit_layers)
        assert torch.equal(again.sequences, plain.sequences)
        if mode != "threshold":
            assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_text_alone_goes_through_branches_of_one_graph(family):
    """In fp32: tokens and layers are those of the twin, which asks the host at every exit."""
    exits = ExitConfig("1,2,3", "mlp,layer,norm")
    model = EarlyExitModel.from_base(tiny(family).cuda(), exits).eval()
    texts = []
    for branches in (True, False):
        engine = Engine(model, [1, 2, 3], capacity=300, max_pending=3, compile=True)
        assert engine.ahead is not None
        engine.ahead = engine.ahead if branches else None
        for policy in (
            Full(4, max_pending=3),
            Fixed(2, max_pending=3),
            Threshold(4, {1: 0.0296, 2: 0.0275, 3: 0.0225}, max_pending=3),
            Threshold(4, {2: 0.0}, max_pending=1),
        ):
            request = Request(list(range(3, 10)), policy, 290)
            events = list(engine.stream([request]))
            texts.append((branches, [(token.id, token.exit_layer) for _, token in events]))
        warm = len(engine.passes.graphs)
        engine.warm_up()
        assert len(engine.passes.graphs) >= warm
    assert [text for branches, text in texts if branches] == [
        text for branches, text in texts if not branches
    ]
    assert len({layer for _, text in texts for _, layer in text}) == 4


@pytest.mark.parametrize("arch", ["mlp", "layer"])
def test_an_exit_is_asked_on_a_stream_beside_the_layers_behind_it(arch):
    """Tokens, layers and confidences are those of the twin, which asks the host."""
    model = EarlyExitModel.from_base(tiny("llama").cuda(), ExitConfig("1", arch)).eval()
    texts, sures, median = [], [], 0.0
    for branches in (True, False):
        engine = Engine(model, [1], capacity=300, max_pending=3, compile=True)
        assert engine.sequences.stops == [1, 3, 4]
        engine.ahead = engine.ahead if branches else None
        for least, most in ((0.0, 3), (0.0, 1), (None, 3), (0.999, 3)):
            policy = Threshold(4, {1: median if least is None else least}, max_pending=most)
            request = Request(list(range(3, 10)), policy, 290)
            events = [token for _, token in engine.stream([request])]
            texts.append([(token.id, token.exit_layer) for token in events])
            sures.append([token.confidence for token in events])
            median = median or sorted(sures[0])[len(sures[0]) // 2] + 1e-6
    assert texts[:4] == texts[4:]
    for found, expected in zip(sures[:4], sures[4:], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert {layer for _, layer in texts[2]} == {1, 4}


def test_texts_that_come_and_go_are_those_that_they_are_alone():
    """In fp32, at full depth: the device is ahead of the host, also where new prompts wait."""
    model = EarlyExitModel.from_base(tiny("llama").cuda(), ExitConfig("1", "mlp")).eval()
    texts = []
    for slots in (1, 6):
        engine = Engine(model, [], slots=slots, capacity=96, compile=True)
        requests = [
            Request(prompt(3 + 13 * i % 67, i), Full(4), 4 + 13 * i % 67 + 7 * i % 22)
            for i in range(40)
        ]
        found = {id(request): [] for request in requests}
        for request, token in engine.stream(requests):
            found[id(request)].append(token.id)
        texts.append([*found.values()])
    assert texts[0] == texts[1]
    assert {len(text) for text in texts[0]} == set(range(1, 23))


@pytest.mark.parametrize("drafts", [False, True])
def test_prompts_are_read_beside_texts_that_go_on(drafts, monkeypatch):
    """In a stream of their own, at any time, short ones and some that are read whole; sampled or
    not, texts are those that they are alone."""
    draw = random.Random(0)
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: draw.choice([0, 3, 3, 3]))
    model, found = drafting().cuda(), []
    policy = Speculative(4, {}, max_pending=3, bar=0.001) if drafts else Full(4, max_pending=3)
    settings = {"capacity": 400, "max_pending": 3, "compile": True}
    for slots in (1, 17):
        engine = Engine(model, [DRAFT] if drafts else [], slots=slots, **settings)
        requests = [
            Request(
                prompt([5, 20, 70, 190, 5, 20, 300][i % 7], i), policy,
                [5, 20, 70, 190, 5, 20, 300][i % 7] + 2 + 17 * i % 61,
                Chooser(sample=i % 3 == 0, seed=i if i % 3 == 0 else None),
            )
            for i in range(150)
        ]  # fmt: skip
        texts, waiting = {request: list(request.ids) for request in requests}, [*requests[::-1]]
        while waiting or engine.busy:
            for _ in range(draw.choice([0, 0, 1, 3])):
                if waiting:
                    engine.submit(waiting.pop())
            for request, token in engine.step():
                texts[request].append(token.id)
        found.append([*texts.values()])
    assert found[0] == found[1]


@pytest.mark.parametrize("sampled", [False, True])
def test_rounds_of_drafts_go_through_branches_of_one_graph(sampled, monkeypatch):
    """The text is that of full depth, and of the twin, whose host looks at each round."""
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda paces, rooms, clock: 3)
    model = drafting().cuda()
    texts = []
    for layers, rounds, policy in (
        ([DRAFT], True, Speculative(4, {}, max_pending=3, bar=0.001)),
        ([DRAFT], False, Speculative(4, {}, max_pending=3, bar=0.001)),
        ([], False, Full(4, max_pending=3)),
    ):
        engine = Engine(model, layers, capacity=300, max_pending=3, compile=True)
        assert engine.ahead is not None
        if not rounds:
            engine.ahead.rounds = None
        chooser = Chooser(sample=sampled, seed=5 if sampled else None)
        request = Request(list(range(3, 10)), policy, 290, chooser)
        texts.append([token.id for _, token in engine.stream([request])])
    assert len(texts[0]) == 283
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("sampled", [False, True])
def test_rounds_of_several_texts_do_not_wait_for_the_host(sampled, monkeypatch):
    """Prompts come while others draft; texts are those of full depth, and of the twin."""
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda paces, rooms, clock: 3)
    model, found, begun, begin = drafting().cuda(), [], [], Together._begin
    monkeypatch.setattr(Together, "_begin", lambda *given: begun.append(given[3]) or begin(*given))
    for layers, together, policy in (
        ([DRAFT], True, Speculative(4, {}, max_pending=3, bar=0.001)),
        ([DRAFT], False, Speculative(4, {}, max_pending=3, bar=0.001)),
        ([], False, Full(4, max_pending=3)),
    ):
        engine = Engine(model, layers, slots=4, capacity=96, max_pending=3, compile=True)
        assert engine.together is not None or not layers
        engine.together = engine.together if together else None
        requests = [
            Request(
                prompt(n, n),
                policy,
                40 + 7 * n,
                Chooser(sample=sampled, seed=n if sampled else None),
            )
            for n in range(3, 9)
        ]
        texts = {request: list(request.ids) for request in requests}
        for request, token in engine.stream(requests):
            texts[request].append(token.id)
        found.append([*texts.values()])
    assert found[0] == found[1] == found[2]
    assert sum(one is not None for one in begun) > 10


@pytest.mark.parametrize("mode", ["full", "speculative"])
def test_texts_that_come_and_end_do_not_let_the_host_wait(mode, monkeypatch):
    """Neither what the device is told of them, nor what becomes of them, waits for the others."""
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda paces, rooms, clock: 3)
    model = drafting().cuda()
    settings = {"slots": 4, "capacity": 96, "compile": True, "mode": mode, "threshold": 0.001}
    texts = [{"input_ids": prompt(n, n), "max_new_tokens": 20 + 3 * n} for n in range(3, 15)]
    found = []
    for waiting in ("default", "error"):
        torch.cuda.set_sync_debug_mode(waiting)
        try:
            found.append([*model.generate_batch(texts, max_pending=3, **settings)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    first, second = (
        {number: out.sequences.tolist() for number, out in outputs} for outputs in found
    )
    assert first == second


@pytest.mark.parametrize("exit", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_drafts_of_a_text_are_found_by_the_device(exit, sampled, monkeypatch):
    """And go to the end as those that the host finds; the text is that of full depth."""
    let_texts_draft(monkeypatch, most=3)
    each = Limits(3, (0, *[3] * MATCH))
    for plan in ("by_text", "beside_text"):
        monkeypatch.setattr(f"ee_tuning.decode.drafts.{plan}", lambda *_: (each, each))
    model, own = drafting().cuda(), [DRAFT] if exit else []
    bar, texts = 0.001 if exit else None, []
    for layers, device, policy in (
        ([LOOKUP, *own], True, Speculative(4, {}, max_pending=3, bar=bar, lookup=True)),
        ([LOOKUP, *own], False, Speculative(4, {}, max_pending=3, bar=bar, lookup=True)),
        ([], False, Full(4, max_pending=3)),
    ):
        engine = Engine(model, layers, capacity=300, max_pending=3, compile=True)
        assert engine.ahead is not None
        engine.ahead = engine.ahead if device else None
        chooser = Chooser(sample=sampled, seed=5 if sampled else None)
        tokens = engine.stream([Request(repeating(40), policy, 290, chooser)])
        texts.append([(token.id, token.exit_layer) for _, token in tokens])
    found, twin, full = ([token for token, _ in text] for text in texts)
    assert len(found) == 250
    assert found == twin == full
    assert any(layer == LOOKUP for _, layer in texts[0])
    if not exit:  # a chain may end elsewhere
        assert texts[0][:240] == texts[1][:240]
