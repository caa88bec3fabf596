"""Chains of the draft exit in decoding: lossless, and draft for draft those of a plain loop."""

from functools import cache

import pytest
import torch
from helpers.families import FAMILIES, tiny
from helpers.models import DEPTH
from helpers.prompts import prompt
from helpers.slow_decoder import draft_loop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.decode.pace import Pace
from ee_tuning.decode.sequences import Row
from ee_tuning.exit_config import DRAFT


@cache
def drafting(family: str = "llama", vocabulary: int = 0) -> EarlyExitModel:
    """A tiny model whose draft exit is right now and then: its layers change little.

    vocabulary: how many tokens the exit knows; 0: all.
    """
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("0", arch="draft")).eval()
    for layer in [*model.backbone.layers, model.draft.block]:
        for p in layer.parameters():
            p.data.mul_(0.05 if p.dim() >= 2 else 1)
    generator = torch.Generator().manual_seed(1)
    for linear in (model.draft.first, model.draft.later):
        linear.weight.data = 0.05 * torch.randn(linear.weight.shape, generator=generator)
        linear.weight.data[:, :32].fill_diagonal_(1.0)
    if vocabulary:
        model.reduce_vocabulary(torch.randperm(96, generator=generator)[:vocabulary].sort().values)
    return model


@pytest.fixture
def rounds(monkeypatch):
    """Chains of full length, and what becomes of them: (slot, drafts, confidences, kept)."""
    seen = []
    draft, keep = Row.draft, Row.keep

    def drafted(row, drafts):
        draft(row, drafts)
        seen.append([row.slot, [d.id for d in drafts], [d.confidence for d in drafts]])

    def kept(row, number, own):
        if seen and seen[-1][0] == row.slot and len(seen[-1]) == 3:
            seen[-1].append(number)
        keep(row, number, own)

    monkeypatch.setattr(Row, "draft", drafted)
    monkeypatch.setattr(Row, "keep", kept)
    monkeypatch.setattr(Pace, "drafts", lambda self, room: max(0, min(self.longest, room - 1)))
    return seen


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    family=st.sampled_from(["llama", "mistral", "gemma3", "opt", "gpt2", "qwen2", "gemma2"]),
    vocabulary=st.sampled_from([0, 40]),
    bar=st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3]),
    longest=st.integers(1, 7),
    new=st.integers(1, 24),
    length=st.integers(1, 30),
    measure=st.sampled_from(["probability", "margin", "entropy"]),
)
def test_chains_are_those_of_a_plain_loop(
    rounds, family, vocabulary, bar, longest, new, length, measure
):
    """Draft for draft, with how sure each was, where a chain ends, and how many are kept."""
    model, ids = drafting(family, vocabulary), prompt(length, length)
    rounds.clear()
    out = model.generate(
        torch.tensor([ids]), mode="speculative", threshold=bar, max_pending=longest,
        max_new_tokens=new, eos_token_id=None, measure=measure,
    )  # fmt: skip
    text, expected = draft_loop(model, ids, new, longest, bar, measure)
    assert out.sequences[0].tolist() == text
    found = [one for one in rounds if one[1]]
    expected = [one for one in expected if one.drafts]
    assert [(one[1], one[3]) for one in found] == [(one.drafts, one.kept) for one in expected]
    for one, same in zip(found, expected, strict=True):
        assert one[2] == pytest.approx(same.confidences, abs=1e-4)


def test_drafts_are_kept_and_rejected_in_these_tests(rounds):
    """Else the other tests would not try what they are about."""
    for family in ("llama", "mistral", "gemma3"):
        drafting(family).generate(
            torch.tensor([prompt(9)]), mode="speculative", threshold=0.0, max_new_tokens=40,
            max_pending=3, eos_token_id=None,
        )  # fmt: skip
    kept, drafted = sum(one[3] for one in rounds), sum(len(one[1]) for one in rounds)
    assert 0.1 < kept / drafted < 0.9
    assert {one[3] for one in rounds} == {0, 1, 2, 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_full_depth(family):
    model, common = drafting(family), {"max_new_tokens": 24, "eos_token_id": None}
    ids = torch.tensor([prompt(5)])
    full = model.generate(ids, mode="full", **common).sequences
    out = model.generate(ids, mode="speculative", threshold=0.01, **common)
    assert torch.equal(out.sequences, full)
    assert {*out.exit_layers[0].tolist()} <= {DRAFT, DEPTH}
