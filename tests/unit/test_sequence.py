"""Parts of a sequence between the tensor-parallel regions; `tests/distributed` has the results."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from helpers.families import tiny
from helpers.steps import exit_gradients
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ee_tuning import EarlyExitModel, ExitConfig, losses
from ee_tuning.errors import UserError
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.sequence import SequencePart, regions
from ee_tuning.parallel.tensor import split_model
from ee_tuning.tune.step import Tuner


@pytest.fixture
def mesh(monkeypatch):
    """This process as the second of two, of which the other answers with anything."""
    monkeypatch.setenv("RANK", "1")
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    mesh = Mesh(tp=2)
    mesh._device_mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("pp", "dp", "tp"))
    yield mesh
    dist.destroy_process_group()


def split(mesh, sequence):
    model = EarlyExitModel(tiny("llama"), ExitConfig("2,3,4", "mlp,layer,norm"))
    split_model(model, mesh, teacher=False, sequence=sequence)
    return model


def batch_of(ids):
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(8).expand(2, 8)}


def test_hidden_states_between_the_regions_are_parts(mesh):
    """Of 8 positions, norms, residuals and what an exit keeps have 4, attention and MLP all."""
    model = split(mesh, sequence=True)
    seen = {}

    def watch(name, module):
        def look(_, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            output = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, set()).add((given.shape[1], output.shape[1]))

        module.register_forward_hook(look, with_kwargs=True)

    for place in [*model.backbone.layers, model.exit(3).block]:
        for name, module in place.named_modules():
            watch(name, module)
    watch("exit norm", model.exit(2).norm)
    watch("exit mlp", model.exit(2).mlp["mlp"])
    tuner, descent = Tuner(model, {}), model.chain.descend(torch.ones(2, 8, dtype=torch.int64))
    for layer in (2, 3, 4):
        state = descent.to(layer)
        assert state.hidden.shape == (2, 4, 32)
        assert tuner.predictions(layer, state)[0].shape == (2, 8, 32)
        if layer == 2:
            assert state.call.args[0].shape == state.call.attention[0].shape == (2, 4, 32)
    parts = ("input_layernorm", "post_attention_layernorm", "exit norm")
    assert {name: seen[name] for name in parts} == {name: {(4, 4)} for name in parts}
    for inner in ("q_proj", "k_proj", "v_proj"):
        assert seen[f"self_attn.{inner}"] == {(8, 8)}
    for last in ("self_attn.o_proj", "mlp.down_proj"):
        assert seen[last] == {(8, 4)}
    # A module is watched after the hooks that gather: it sees what they made.
    assert seen["self_attn"] == seen["mlp"] == seen["exit mlp"] == {(8, 4)}


class Sent(TorchDispatchMode):
    """Bytes that go into collectives, by their names."""

    def __init__(self):
        super().__init__()
        self.nbytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.removesuffix(".default")
        if name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            self.nbytes[name] += args[0].nbytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sequence", [False, True])
def test_a_sum_becomes_a_gather_and_a_scatter(mesh, sequence):
    """As many bytes: a ring's all-reduce is a reduce-scatter and an all-gather of the same size."""
    model = split(mesh, sequence)
    with Sent() as sent:
        model.chain.descend(torch.ones(2, 8, dtype=torch.int64)).to(4)
    summed = 2 * 4 * (2 * 8 * 32 * 4)  # two products of each of 4 layers give (B, T, H) in fp32
    if sequence:
        gathered = summed // 2  # of each process
        assert sent.nbytes == {"reduce_scatter_tensor": summed, "all_gather_into_tensor": gathered}
    else:
        assert sent.nbytes == {"all_reduce": summed}


def test_a_head_s_terms_are_summed_once_however_many_chunks(mesh, monkeypatch):
    model = split(mesh, sequence=True)
    monkeypatch.setattr(losses, "LOGITS", 2 * 2 * 48)  # two positions at a time
    batch = batch_of(torch.ones(2, 8, dtype=torch.int64))
    state = model.chain.descend(batch["input_ids"]).to(4)
    with Sent() as sent:
        Tuner(model, {}).loss(4, state, batch["labels"], scale=torch.ones(()))
    features = 2 * 8 * 32 * 4
    positions = 2 * (3 + 3 + 3 + 2)  # of each chunk, with the first of the next
    assert sent.nbytes == {
        "all_gather_into_tensor": features // 2,
        "reduce_scatter_tensor": features,
        "all_reduce": 3 * positions * 4,  # the largest logit, the sum, the label's
    }


def test_gradients_of_what_sees_a_part_are_summed(mesh):
    model = split(mesh, sequence=True)
    summed = {name for name, p in model.exits.named_parameters() if getattr(p, "summed", False)}
    norms = ("2.norm", "3.norm", "4.norm", "3.block.input_layernorm")
    assert summed == {f"{name}.weight" for name in (*norms, "3.block.post_attention_layernorm")}
    batch = batch_of(torch.ones(2, 8, dtype=torch.int64))
    assert len(exit_gradients(model, [batch])) == 3
    assert all(p.grad is not None for p in model.exits.parameters())


def test_the_parts_are_next_to_each_other(mesh):
    part = SequencePart(mesh.axis("tp"))
    x = torch.arange(16.0).view(1, 8, 2)
    assert torch.equal(part.own(x), x[:, 4:])


def test_plans_that_split_outside_of_regions_are_refused():
    assert regions({"self_attn.q_proj": "colwise", "mlp.down_proj": "rowwise"}) == {
        "self_attn", "mlp",
    }  # fmt: skip
    with pytest.raises(UserError, match="within attention and MLP only, fc1 lies outside"):
        regions({"self_attn.q_proj": "colwise", "fc1": "colwise"})
