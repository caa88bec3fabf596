"""Samples of many rows are drawn together, and each row's are what they are alone."""

import pytest
import torch
from helpers.models import DEPTH, early_exit, good_exit
from helpers.prompts import prompt
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ee_tuning.decode import Chooser, Engine, Full, Request, Speculative, Threshold
from ee_tuning.decode.noise import Source, exponential, uniform

CPU = torch.device("cpu")


def test_numbers_of_seeds_are_uniform_and_exponential():
    """χ² over 64 classes of equal probability; the bound is its mean plus 5 standard deviations."""
    sources = [Source(seed) for seed in (0, 1, 2**61)]
    bound = 63 + 5 * (2 * 63) ** 0.5
    for _ in range(3):
        for values in (
            uniform(sources, [64_000] * 3, CPU),
            1 - (-exponential(sources, torch.empty(3, 64_000))).exp(),
        ):
            assert (values > 0).all()
            assert (values < 1).all()
            for row in values:
                counts = torch.histc(row, 64, 0, 1)
                assert ((counts - 1000) ** 2 / 1000).sum() < bound
    assert [source.drawn for source in sources] == [6] * 3


def test_numbers_of_rows_and_draws_have_nothing_in_common():
    """Correlations of 50,000 numbers each are within 5 standard deviations of 0."""
    sources = [Source(seed) for seed in range(6)]
    rows = torch.cat([uniform(sources, [50_000] * 6, CPU) for _ in range(3)])
    found = torch.corrcoef(rows) - torch.eye(18)
    assert found.abs().max() < 5 / 50_000**0.5
    shifted = torch.corrcoef(torch.stack([rows[0, 1:], rows[0, :-1]]))
    assert shifted[0, 1].abs() < 5 / 50_000**0.5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_row_draws_the_same_whoever_is_beside_it(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")

    def draw(seeds):
        sources = [Source(seed) for seed in seeds]
        lots = uniform(sources, [3 + i for i in range(len(seeds))], torch.device(device)).cpu()
        return lots, exponential(sources, torch.empty(len(seeds), 99, device=device)).cpu()

    lots, noise = draw([5, 6, 7])
    alone = draw([7])
    torch.testing.assert_close(alone[1][0], noise[2], rtol=1e-6, atol=0)  # of log, by device
    assert torch.equal(alone[0][0], lots[2, :3])
    torch.manual_seed(3)
    expected = torch.rand(3, device=device).cpu(), torch.empty(99, device=device).exponential_()
    torch.manual_seed(3)
    lots, noise = draw([None, 7])
    assert torch.equal(lots[0, :3], expected[0])
    assert torch.equal(noise[0], expected[1].cpu())
    torch.testing.assert_close(noise[1], alone[1][0], rtol=1e-6, atol=0)


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


def test_rows_that_are_sampled_together_have_the_texts_that_they_have_alone():
    """In any order of processors that are alike, of drafts kept and rejected, and of the greedy."""
    alone = texts(1)
    assert texts(15) == texts(4) == alone
    layers = {layer for i in range(2, 15, 3) for _, layer in alone[i]}
    assert layers == {2, DEPTH}


@pytest.mark.parametrize("policy", [Full(DEPTH), Speculative(DEPTH, {1: 0.0}, max_pending=3)])
def test_the_device_is_waited_for_once_a_pass_and_once_for_all_samples(policy, monkeypatch):
    """And processors that are alike run once for all rows, when a draft is chosen or verified."""
    engine = Engine(early_exit(), [1], slots=8, capacity=64)
    for i in range(8):
        engine.submit(Request(prompt(4, i), policy, 40, Chooser(warpers(), sample=True)))
    engine.step()
    waits, passes, warped = [], [], []
    tolist, window, top_k = torch.Tensor.tolist, engine.passes.window, TopKLogitsWarper.__call__

    def warp(self, input_ids, scores):
        warped.append(len(scores))
        return top_k(self, input_ids, scores)

    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: waits.append(x) or tolist(x))
    monkeypatch.setattr(engine.passes, "window", lambda *a: passes.append(a) or window(*a))
    monkeypatch.setattr(TopKLogitsWarper, "__call__", warp)
    for kind, name in ((torch.Tensor, "item"), (torch.Tensor, "__bool__")):
        monkeypatch.setattr(kind, name, lambda *_: pytest.fail("one more wait"))
    for _ in range(4):
        assert len(engine.step()) >= 8
    assert len(warped) <= len(passes)
    assert max(warped) >= 8
    assert len(waits) <= 2 * len(passes)


def test_a_greedy_row_with_processors_is_verified_as_transformers_chooses():
    model, ids = good_exit("llama"), torch.tensor([prompt(5)])
    common = {"max_new_tokens": 24, "eos_token_id": None, "repetition_penalty": 1.3}
    expected = model.backbone.model.generate(ids, do_sample=False, **common)
    for mode in ("full", "speculative"):
        out = model.generate(ids, mode=mode, threshold=0.0, **common)
        assert torch.equal(out.sequences, expected)
