"""Samples of many rows are drawn together, and each row's are what they are alone."""

import pytest
import torch
from helpers.families import tiny
from helpers.models import DEPTH, drafting, early_exit, good_exit
from helpers.prompts import prompt
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.decode import Chooser, Engine, Full, Request, Speculative, Threshold


def warpers(temperature=0.8, top_k=20):
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k)])


class Banned(LogitsProcessor):
    """Looks at the text: its last token does not come again, and what it is given is written to."""

    def __call__(self, input_ids, scores):
        scores[torch.arange(len(scores)), input_ids[:, -1]] = -torch.inf
        return scores


def requests():
    """Sampled in several ways, some alike, beside rows that are not sampled."""
    policies = [
        Full(DEPTH), Threshold(DEPTH, {2: 0.02}), Speculative(DEPTH, {2: 0.0}, max_pending=4),
    ]  # fmt: skip
    processors = [
        warpers(), warpers(), warpers(1.3, 5), (), [Banned(), *warpers()],
        [RepetitionPenaltyLogitsProcessor(1.5), TopPLogitsWarper(0.9)],
    ]  # fmt: skip
    return [
        Request(
            prompt(3 + i % 4, i),
            policies[i % 3],
            22,
            Chooser(LogitsProcessorList(processors[i % 6]), sample=i % 5 != 4),
        )
        for i in range(15)
    ]


def texts(slots):
    engine = Engine(good_exit("llama"), [2, 3], slots=slots, capacity=64)
    torch.manual_seed(1)
    found, asked = {}, requests()
    for request, token in engine.stream(asked):
        found.setdefault(asked.index(request), []).append((token.id, token.exit_layer))
    return found


def test_rows_that_are_sampled_together_have_the_texts_that_they_have_alone(monkeypatch):
    """In any order of processors that are alike, of drafts kept and rejected, and of the greedy."""
    monkeypatch.setattr(Speculative, "steady", True)  # others' texts are not verified
    alone = texts(1)
    assert texts(15) == texts(4) == alone
    layers = {layer for i in range(2, 15, 3) for _, layer in alone[i]}
    assert layers == {2, DEPTH}


@pytest.mark.parametrize("policy", [Full(DEPTH), Speculative(DEPTH, {1: 0.0}, max_pending=3)])
def test_the_device_is_waited_for_once_a_pass(policy, monkeypatch):
    """And transformers' warpers are not run: passes do what they would."""
    engine = Engine(early_exit(), [1], slots=8, capacity=64)
    for i in range(8):
        engine.submit(Request(prompt(4, i), policy, 40, Chooser(warpers(), sample=True)))
    engine.step()
    waits, passes = [], []
    tolist, window = torch.Tensor.tolist, engine.passes.window

    def read(x):
        if x.is_floating_point():  # what a pass found, not where it stands, which the host knows
            waits.append(x)
        return tolist(x)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    monkeypatch.setattr(engine.passes, "window", lambda *a: passes.append(a) or window(*a))
    monkeypatch.setattr(TopKLogitsWarper, "__call__", lambda *_: pytest.fail("it was run"))
    for kind, name in ((torch.Tensor, "item"), (torch.Tensor, "__bool__")):
        monkeypatch.setattr(kind, name, lambda *_: pytest.fail("one more wait"))
    for _ in range(4):
        assert len(engine.step()) >= 8
    assert len(waits) <= len(passes)


def test_a_greedy_row_with_processors_is_verified_as_transformers_chooses():
    model, ids = good_exit("llama"), torch.tensor([prompt(5)])
    common = {"max_new_tokens": 24, "eos_token_id": None, "repetition_penalty": 1.3}
    expected = model.backbone.model.generate(ids, do_sample=False, **common)
    for mode in ("full", "speculative"):
        out = model.generate(ids, mode=mode, threshold=0.0, **common)
        assert torch.equal(out.sequences, expected)


SAMPLING = [
    {"top_k": 0, "temperature": 0.8},
    {"top_k": 20, "temperature": 1.2, "top_p": 0.9},
    {"top_k": 0, "min_p": 0.05},
    {"top_k": 9, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("exits", ["0", "2", "2,3"])
def test_sampled_texts_are_those_of_full_depth_whatever_drafts(exits, sampling, monkeypatch):
    """Token by token, for 24 seeds; drafts are kept and rejected, whether or not they pay."""
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda paces, *_: paces[0].longest)
    model = drafting() if exits == "0" else good_exit("llama")
    ids = torch.tensor([prompt(6)]).expand(24, -1)
    common = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None, **sampling}
    found = []
    for mode in (
        {"mode": "full"},
        {"mode": "speculative", "threshold": 0.0, "exit_layers": exits, "max_pending": 3},
    ):
        torch.manual_seed(7)
        found.append(model.generate(ids, **mode, **common))
    full, out = found
    assert torch.equal(out.sequences, full.sequences)
    assert len({tuple(text) for text in full.sequences.tolist()}) == 24
    kept = (out.exit_layers < DEPTH).double().mean()
    assert 0.05 < kept < 0.75


class Grammar(LogitsProcessor):
    """Knows nothing of texts with tokens that it bans."""

    def __init__(self, banned):
        self.banned = banned

    def __call__(self, input_ids, scores):
        if {*input_ids[0, 6:].tolist()} & self.banned:
            raise ValueError("there is no such text")
        return scores.index_fill(1, torch.tensor([*self.banned]), -torch.inf)


@pytest.mark.parametrize("seed", range(4))
def test_what_a_processor_says_behind_a_draft_that_is_not_kept_is_not_asked(seed, monkeypatch):
    monkeypatch.setattr(Speculative, "steady", True)
    banned = {
        *torch.randperm(93, generator=torch.Generator().manual_seed(seed))[:20].add(3).tolist()
    }
    found = []
    for policy in (Full(DEPTH), Speculative(DEPTH, {}, max_pending=4, bar=0.0)):
        engine = Engine(drafting(), [0], slots=2, capacity=60, max_pending=8, drafts=True)
        request = Request(
            prompt(6, seed), policy, 26, Chooser(LogitsProcessorList([Grammar(banned)]))
        )
        found.append([token.id for _, token in engine.stream([request])])
    assert found[0] == found[1]


def test_what_a_processor_says_behind_the_end_of_a_text_is_not_met(monkeypatch):
    """Where that was drafted, and kept; of each token of a text as the one that ends it."""
    monkeypatch.setattr(Speculative, "steady", True)
    ids = prompt(6, 2)

    def text(policy, ends, processors=()):
        engine = Engine(drafting(), [0], slots=2, capacity=60, max_pending=8, drafts=True)
        chooser = Chooser(LogitsProcessorList(processors))
        request = Request(ids, policy, 40, chooser, lambda ids, length: ids[length - 1] in ends)
        return [token.id for _, token in engine.stream([request])]

    drafts, found = Speculative(DEPTH, {}, max_pending=4, bar=0.0), []
    for end in dict.fromkeys(text(Full(DEPTH), ())):

        def over(input_ids, scores, end=end):
            if end in input_ids[0, 6:]:
                raise ValueError("it is over")
            return scores

        found.append([text(policy, [end], [over]) for policy in (Full(DEPTH), drafts)])
    assert len(found) > 9
    assert all(full == drafted for full, drafted in found)


def test_an_exit_without_a_token_to_choose_drafts_none(monkeypatch):
    """Of a reduced vocabulary, all of which a processor excludes; full depth has others."""
    monkeypatch.setattr(Speculative, "steady", True)
    model = early_exit_of_few(range(48))

    def only(input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_copy_(
            1, torch.arange(60, 64), scores[:, 60:64]
        )

    found = []
    for policy in (Full(DEPTH), Speculative(DEPTH, {2: 0.0}, max_pending=4)):
        engine = Engine(model, [2], slots=2, capacity=60, max_pending=8, drafts=True)
        request = Request(prompt(5), policy, 17, Chooser(LogitsProcessorList([only])))
        found.append([token.id for _, token in engine.stream([request])])
    assert found[0] == found[1]
    assert len(found[0]) == 12


def early_exit_of_few(tokens):
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("2", arch="norm")).eval()
    model.reduce_vocabulary(torch.tensor([*tokens]))
    return model
