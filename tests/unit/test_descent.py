"""A micro-batch on its way down the frozen layers: what it gives, and what it lets go of."""

import weakref
from itertools import pairwise

import pytest
import torch
from helpers.families import tiny

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.pipeline import Pipeline
from ee_tuning.tune.optimizers import build_optimizers
from ee_tuning.tune.step import Tuner
from ee_tuning.tune_config import Schedule

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,3", "mlp"))


def hidden(model, layer):
    """After a layer, by transformers' own forward."""
    found = []
    hook = model.backbone.layers[layer - 1].register_forward_hook(
        lambda _, __, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model.model(IDS, use_cache=False)
    hook.remove()
    return found[0]


def test_states_are_those_of_the_whole_backbone_however_they_are_asked_for(model):
    step_by_step, ahead = model.chain.descend(IDS), model.chain.descend(IDS, keeps=[1, 3])
    assert torch.equal(ahead.ahead(4), hidden(model, 4))
    assert ahead.at == 4
    for layer in (1, 3):
        expected = hidden(model, layer)
        assert torch.equal(step_by_step.to(layer).hidden, expected)
        assert torch.equal(ahead.to(layer).hidden, expected)
        # An exit may need the states after several layers, of which it is given the last.
        assert torch.equal(ahead.kept[layer], expected)
    assert torch.equal(step_by_step.to(4).hidden, hidden(model, 4))
    assert not step_by_step.kept


def test_a_layer_may_be_passed_without_a_state_of_it(model):
    assert torch.equal(model.chain.descend(IDS).to(3).hidden, hidden(model, 3))


def test_a_state_is_given_away_once(model):
    descent = model.chain.descend(IDS)
    descent.to(1)
    with pytest.raises(AssertionError, match="after layer 1 was given away"):
        descent.to(1)
    assert torch.equal(descent.ahead(1), hidden(model, 1))


def test_what_an_exit_needed_is_gone_before_deeper_layers_run(model):
    """Its attention's output and the layer's input, of an `mlp` exit's state."""
    left, alive = [], []
    model.backbone.layers[1].input_layernorm.register_forward_pre_hook(
        lambda *_: alive.append([kept() is not None for kept in left])
    )
    descent = model.chain.descend(IDS)
    call = descent.to(1).call
    left += [weakref.ref(call.args[0]), weakref.ref(call.attention[0])]
    del call
    descent.to(3)
    assert alive == [[False, False]]


def test_the_timeline_of_one_process_is_of_events_that_follow_one_another(model):
    """Layers run before the exit work that needs them, not inside."""
    pipeline = Pipeline(Mesh())
    tuner = Tuner(model, build_optimizers(model, Schedule()), transport=pipeline)
    batch = {"input_ids": IDS, "labels": IDS, "position_ids": torch.arange(9).repeat(2, 1)}
    pipeline.timeline.on = True
    tuner.step([batch, batch], {1: 1.0, 3: 1.0})
    events = pipeline.timeline.events
    assert [what for what, *_ in events].count("forward") == 4
    assert {what for what, *_ in events} == {"forward", "exit work", "waiting"}
    assert all(a[2] <= b[1] for a, b in pairwise(events))
