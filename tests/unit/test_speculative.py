"""Self-speculation is lossless: greedy tokens are those of full depth, samples its distribution."""

import json
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES, tiny
from helpers.models import DEPTH, early_exit, good_exit
from helpers.prompts import padded, prompt
from helpers.sampled import assert_full_depths
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.costs import draft_cost
from ee_tuning.decode import Chooser, Engine, Request, Speculative
from ee_tuning.loading import load_tokenizer
from ee_tuning.model import Network

IDS = torch.tensor([[5, 9, 11, 40, 7]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arch", ["norm", "layer"])
def test_greedy_tokens_are_those_of_full_depth(family, arch):
    model = good_exit(family, arch)
    common = {"max_new_tokens": 16, "eos_token_id": None}
    full = model.generate(IDS, mode="full", **common).sequences
    for threshold in (0.0, 0.03):
        out = model.generate(IDS, mode="speculative", threshold=threshold, **common)
        assert torch.equal(out.sequences, full)
        assert out.exit_layers.shape == (1, 16)


def test_drafts_are_kept_and_rejected_in_these_tests():
    """Else the other tests would not try what they are about."""
    out = good_exit("llama").generate(
        IDS, mode="speculative", threshold=0.0, max_new_tokens=50, eos_token_id=None
    )
    kept = (out.exit_layers[0] < DEPTH).float().mean()
    assert 0.1 < kept < 0.95


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral", "gemma3", "opt", "gpt2", "qwen2"]),
    threshold=st.floats(0, 0.1),
    max_pending=st.integers(1, 9),
    new=st.integers(1, 30),
    exits=st.sampled_from([[2], [3], [2, 3]]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    measure=st.sampled_from(["probability", "margin", "entropy"]),
)
def test_any_setting_gives_the_tokens_of_full_depth(
    family, threshold, max_pending, new, exits, lengths, measure
):
    """Batches of different lengths, each accepting and rejecting at its own places."""
    model = good_exit(family)
    ids, mask = padded([prompt(length, length) for length in lengths])
    common = {"attention_mask": mask, "max_new_tokens": new, "eos_token_id": None}
    out = model.generate(
        ids, mode="speculative", threshold=threshold, exit_layers=exits,
        max_pending=max_pending, measure=measure, **common,
    )  # fmt: skip
    assert torch.equal(out.sequences, model.generate(ids, mode="full", **common).sequences)


@pytest.mark.slow
def test_200_prompts_of_real_text_give_the_tokens_of_full_depth():
    """On the demo's backbone in fp32, with exits that are copies and not tuned."""
    demo = Path(__file__).parents[2] / "demo"
    config = ExitConfig("8,14", arch="layer,norm")
    model = EarlyExitModel.from_base(str(demo / "model"), config, dtype=torch.float32)
    tokenizer = load_tokenizer(str(demo / "model"))
    lines = (demo / "data" / "validation.jsonl").read_text().splitlines()
    ids = tokenizer("".join(json.loads(line)["text"] for line in lines), return_tensors="pt")
    prompts = ids.input_ids[0][: 200 * 20].view(200, 20)
    kept = 0
    for batch in prompts.split(20):
        common = {"max_new_tokens": 8, "eos_token_id": None}
        full = model.generate(batch, mode="full", **common).sequences
        out = model.generate(batch, mode="speculative", threshold=0.3, **common)
        assert torch.equal(out.sequences, full)
        kept += (out.exit_layers < model.backbone.num_layers).sum().item()
    assert kept > 100


@pytest.mark.slow
def test_samples_have_the_full_models_distribution():
    """Four tokens of a vocabulary of 5 by exact enumeration, χ² over 4,000 draws.

    So there are up to two drafts at a time, and what a penalty sees depends on them. Expected
    counts below 5 are pooled. The bound is the mean plus 5 standard deviations of χ².
    """
    torch.manual_seed(0)
    base = tiny("llama", vocab_size=5, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    model = EarlyExitModel.from_base(base, ExitConfig("1,2", arch="norm")).eval()
    model.backbone.head.weight.data.mul_(1.5)
    for layer in model.exit_layers:
        model.exit(layer).head.weight.data.mul_(1.5)
    ids = torch.tensor([[1, 3]])
    draws, new = 4000, 4
    penalty, top_k, temperature = 4.0, 4, 0.8
    common = {"repetition_penalty": penalty, "top_k": top_k, "temperature": temperature}
    counts, early = torch.zeros([5] * new), torch.zeros(new)
    for _ in range(draws // 100):
        out = model.generate(
            ids, mode="speculative", threshold=0.0, num_return_sequences=100, do_sample=True,
            max_new_tokens=new, **common,
        )  # fmt: skip
        for text in out.sequences[:, 2:].tolist():
            counts[tuple(text)] += 1
        early += (out.exit_layers < DEPTH).sum(0)
    assert (early[1:3] > draws / 4).all()  # a round of two drafts was tried, and some were kept
    assert (early[1:3] < 0.9 * draws).all()

    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
        ]
    )
    assert_full_depths(counts, model, ids, processors)


class Rejecting(Chooser):
    """Settles tokens by a list, so that most drafts are rejected; keeps what it was shown."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.seen = tokens, []

    def follow(self, ids, found):
        self.seen.append((list(ids), found.logits.clone()))
        return self.tokens[len(ids) % len(self.tokens)]

    def verify(self, ids, found, drafts):
        first = len(ids) - len(drafts)
        for kept, draft in enumerate(drafts):
            self.seen.append((ids[: first + kept], found[kept].logits.clone()))
            if (first + kept) % 3 == 0:
                return kept, (draft.id + 1) % 96
        return len(drafts), self.follow(ids, found[-1])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("arch", ["layer", "mlp"])
def test_rejected_drafts_leave_nothing_behind(family, arch):
    """Every prediction after a rejection, of the exits and of the end, is that from scratch.

    Tolerance: a window of several tokens sums in another order.
    """
    model = early_exit(family, arch)
    policy = Speculative(DEPTH, {1: 0.0}, max_pending=4)
    chooser = Rejecting([20, 31, 50, 7, 9])
    engine = Engine(model, [1], capacity=60, max_pending=4)
    request = Request(prompt(7), policy, 45, chooser)
    layers = [token.exit_layer for _, token in engine.stream([request])]
    assert set(layers) == {1, DEPTH}
    wrong = 0
    for ids, logits in chooser.seen:
        out = model(torch.tensor([ids]), output_exit_logits=True, output_logits=True)
        both = (out.exit_logits[1], out.logits)
        wrong += min((logits - one[0, -1]).abs().max() for one in both) > 1e-3
    assert len(chooser.seen) > 60
    assert not wrong


def test_an_end_token_within_a_draft_ends_it_as_at_full_depth():
    model = good_exit("llama")
    common = {"max_new_tokens": 30}
    free = model.generate(IDS, mode="full", eos_token_id=None, **common).sequences[0, 5:]
    for end in free.unique().tolist():
        full = model.generate(IDS, mode="full", eos_token_id=end, **common).sequences
        out = model.generate(IDS, mode="speculative", threshold=0.0, eos_token_id=end, **common)
        assert torch.equal(out.sequences, full)
        assert out.exit_layers.shape[1] == full.shape[1] - 5


@pytest.mark.parametrize("head", ["own", "shared"])
def test_a_draft_costs_the_weights_it_is_multiplied_with(head):
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("2", arch="mlp", head=head))
    used = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda one, *_: used.append(one.weight.numel()))

    def weights(mode):
        """Of one token more."""
        found = []
        for number in (3, 3, 2):  # the first call makes an engine
            used.clear()
            model.generate(IDS, max_new_tokens=number, mode=mode)
            found.append(sum(used))
        return found[1] - found[2]

    assert draft_cost(model, 2) == weights("fixed") / weights("full")


def test_stages_of_which_some_have_no_exits_count_a_draft_as_one_process_does():
    config = ExitConfig("1,2", arch="mlp,layer")
    whole = draft_cost(EarlyExitModel.from_base(tiny("llama"), config), 2)
    stages = [Network(tiny("llama"), config, stage) for stage in (range(2), range(2, 4))]
    assert stages[1].exit_layers == []
    counted = []
    for stage in stages:
        draft_cost(stage, 2, lambda own: counted.append(own) or [own])
    assert [draft_cost(stage, 2, lambda _: counted) for stage in stages] == [whole, whole]
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("2,4", arch="norm"))
    with pytest.raises(UserError, match="cannot draft with the exit at the last layer, 4"):
        model.generate(IDS, mode="speculative", max_new_tokens=2)
    out = model.generate(IDS, mode="speculative", exit_layers=[2], max_new_tokens=2)
    assert out.sequences.shape == (1, 7)
