"""A backbone of which each process keeps a part; `tests/distributed` runs such layouts."""

import pytest
import torch
import torch.distributed as dist
from helpers.families import tiny
from torch.testing._internal.distributed.fake_pg import FakeStore

from ee_tuning import ExitConfig
from ee_tuning.model import Network
from ee_tuning.share import New, Share, load


@pytest.fixture
def group():
    """This process as the second of four, of which the others answer with anything."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_process_keeps_its_part_and_two_layers_at_most(group):
    base = tiny("llama")
    before = [[p.clone() for p in layer.parameters()] for layer in base.model.layers]
    model = load(New(base, ExitConfig("2,4", "mlp,norm")), Share(shard=group), Network)
    shards = list(model.chain.shards.values())
    for layer, shard, old in zip(base.model.layers, shards, before, strict=True):
        flat = torch.cat([p.flatten() for p in old if p.dim() >= 2])
        assert torch.equal(shard.part, flat.chunk(4)[1])
        kept = [p.numel() for p in layer.parameters()]
        assert kept == [p.numel() if p.dim() < 2 else 0 for p in old]

    held = []

    def look(*_):
        whole = [shard.matrices[0].numel() > 0 for shard in shards]
        coming = [shard._gathering is not None for shard in shards]
        held.append((whole.index(True), sum(whole), sum(coming)))

    for start in (0, 2):
        for layer in model.chain.segment(start).layers:
            layer.register_forward_pre_hook(look)
    descent = model.chain.descend(torch.ones(2, 8, dtype=torch.int64))
    for layer in (2, 4):
        descent.to(layer)
        assert not any(shard.matrices[0].numel() for shard in shards)
    # Layer by layer, the next of its segment on its way.
    assert held == [(0, 1, 1), (1, 1, 0), (2, 1, 1), (3, 1, 0)]
