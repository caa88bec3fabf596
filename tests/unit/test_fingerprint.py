"""Weights that changed are told from those that did not, whoever asks."""

import pytest
import torch
from helpers.families import tiny
from torch import nn

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.fingerprint import (
    SAMPLES_PER_TENSOR,
    exit_hash,
    sample,
    sample_places,
    state_of,
    states_of,
)

FEW = torch.tensor([1.0, 2.0, 3.0])
WEIGHTS = {
    "matrix": torch.arange(1.0, 97).reshape(8, 12),
    "transposed": torch.arange(1.0, 97).reshape(8, 12).t(),
    "part": torch.arange(1.0, 98)[1:],
    "odd": torch.arange(1.0, 100).reshape(9, 11).bfloat16(),
    "few": FEW,
    "fp8": FEW.to(torch.float8_e4m3fn),
}


def change(weight):
    with torch.no_grad():
        weight.copy_(-weight.float())


def change_data(weight):
    """As PEFT merges."""
    weight.data.copy_(-weight.float())


def elsewhere(weight):
    weight.data = weight.data.clone()


def parameter(kind):
    return nn.Parameter(WEIGHTS[kind].clone(), requires_grad=False)


@pytest.mark.parametrize("every_value", [False, True])
@pytest.mark.parametrize("way", [change, change_data, elsewhere])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_that_changed_has_another_state(kind, way, every_value):
    weight = parameter(kind)
    before = state_of(weight, every_value)
    assert state_of(weight, every_value) == before
    kept = weight.data  # so that no other one lies there
    way(weight)
    assert state_of(weight, every_value) != before
    assert len(kept) == len(weight)


def test_every_value_is_more_than_a_sample():
    weight = nn.Parameter(torch.ones(1000), requires_grad=False)
    before = [state_of(weight, every_value) for every_value in (False, True)]
    assert 1 not in sample_places(1000)
    weight.data[1] = 2
    after = [state_of(weight, every_value) for every_value in (False, True)]
    assert [a != b for a, b in zip(after, before, strict=True)] == [False, True]


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if kind != "fp8"])
def test_a_sample_is_spread_over_a_weight(kind):
    values = [*WEIGHTS[kind].flatten()]
    places = [int(n * (len(values) - 1) / (SAMPLES_PER_TENSOR - 1)) for n in range(64)]
    assert sample(WEIGHTS[kind]).tolist() == [values[place] for place in places]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_of_what_has_no_values_there_is_a_state(device):
    for shape in ((0,), (0, 4), (3, 4)) if device == "meta" else ((0,), (0, 4)):
        assert state_of(torch.empty(shape, device=device)) is not None


def test_what_was_made_in_inference_mode_has_no_version():
    with torch.inference_mode():
        weight = torch.ones(3)
        before = state_of(weight)
        weight.mul_(2)
        assert state_of(weight) != before


def test_the_states_of_a_model_are_those_of_its_parameters():
    """Also where a part is none, or has none."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("2,3", arch="mlp", head="shared"))
    model.model.model.layers[0].extra = None
    model.model.model.layers[0].register_module("nothing", None)
    model.model.model.layers[0].register_parameter("bias", None)
    weights = [p for _, p in model.named_parameters(remove_duplicate=False)]
    assert sorted(states_of(model), key=str) == sorted(map(state_of, weights), key=str)


@pytest.mark.parametrize("way", [change, change_data])
@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_an_exit_that_was_changed_has_another_hash(way, what):
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("2", arch="mlp", head="shared"))
    model.reduce_vocabulary(torch.arange(40))
    exit = model.exit(2)
    before = exit_hash(exit)
    (weight, *_) = exit.parameters() if what == "parameter" else exit.buffers()
    way(weight)
    after = exit_hash(exit)
    assert after != before
    way(weight)
    assert exit_hash(exit) == before
