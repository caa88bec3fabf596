"""Models go to other processes: pickled, they are what they were, whatever they have done."""

import copy
import pickle

import pytest
import torch
from helpers.families import tiny

from ee_tuning import EarlyExitModel, ExitConfig

IDS = torch.tensor([[5, 9, 11, 40]])


def forward(model):
    model(IDS, labels=IDS)


def generate(model):
    model.generate(IDS, threshold=0.02, max_new_tokens=6)


def give_up(model):
    """A stream that nobody reads to its end."""
    next(model.generate_batch([[5, 9], [7]], max_new_tokens=6))


@pytest.mark.parametrize("used", [forward, generate, give_up])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_was_used_can_be_pickled_and_copied(used, way):
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,2,3", arch="mlp,norm,layer"))
    used(model)
    other = way(model)
    texts = [m.generate(IDS, threshold=0.02, max_new_tokens=9) for m in (model, other)]
    assert torch.equal(texts[0].sequences, texts[1].sequences)
    assert torch.equal(texts[0].exit_layers, texts[1].exit_layers)
    with torch.no_grad():  # nothing is shared, and what it runs is its own
        other.exit(1).head.weight.zero_()
    assert not torch.equal(model.exit(1).head.weight, other.exit(1).head.weight)
    losses = other(IDS, labels=IDS).exit_losses
    assert losses[1].item() == pytest.approx(torch.tensor(96.0).log().item())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_so_can_one_that_is_not_whole(way, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    model = EarlyExitModel.from_base(str(tmp_path), ExitConfig("1,2"), whole=False)
    losses = [m(IDS, labels=IDS).exit_losses for m in (model, way(model))]
    assert losses[0] == losses[1]
