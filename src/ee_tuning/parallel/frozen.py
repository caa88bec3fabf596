"""Frozen layers of which every data-parallel rank keeps a part: whole only while they run.

Not torch's `fully_shard`, which gathers in hooks of the modules it is given: segments run twins of
a layer, without its hooks (`ee_tuning.twin`), and an `mlp` exit runs the layer's norms again once
the layer is over. So the hooks are put on the twins, norms and biases stay whole, and what is
gathered are matrices, which nothing but the layer itself reads.
"""

from __future__ import annotations

from itertools import zip_longest

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ee_tuning.backbone import Segment
from ee_tuning.parallel.mesh import all_gather


class FrozenShard:
    """The matrices of a frozen layer, of which this process keeps a part.

    part: the process's share of all their values, laid end to end and padded.
    """

    def __init__(self, layer: nn.Module, group: dist.ProcessGroup) -> None:
        """Takes the matrices' values out of the layer."""
        self.group, self.size = group, dist.get_world_size(group)
        self.matrices = [p for p in layer.parameters() if p.dim() >= 2]
        self.shapes = [p.shape for p in self.matrices]
        flat = torch.cat([p.detach().flatten() for p in self.matrices])
        flat = F.pad(flat, (0, -len(flat) % self.size))
        self.part = flat.chunk(self.size)[dist.get_rank(group)].clone()
        self._gathering: tuple[dist.Work, torch.Tensor] | None = None
        self.free()

    def start(self) -> None:
        """Begin to gather the matrices, beside other work."""
        whole = self.part.new_empty(self.size * len(self.part))
        work = all_gather(whole, self.part, group=self.group, async_op=True)
        assert work is not None
        self._gathering = work, whole

    def gather(self) -> None:
        """Make the matrices whole, until they are `free`."""
        if self._gathering is None:
            self.start()
        assert self._gathering is not None
        (work, whole), self._gathering = self._gathering, None
        work.wait()
        sizes = [shape.numel() for shape in self.shapes]
        values = whole[: sum(sizes)].split(sizes)
        for p, shape, own in zip(self.matrices, self.shapes, values, strict=True):
            p.data = own.view(shape)

    def free(self) -> None:
        """Leave nothing of the matrices but the part."""
        for p in self.matrices:
            p.data = p.data.new_empty(0)


class FrozenShards(dict[int, FrozenShard]):
    """The shards of frozen layers, by the layers' numbers from 0.

    Every process of the group has to run the layers equally often, in the same order.
    """

    def prepare(self, segment: Segment) -> None:
        """Let the layers of `segment` be whole while they run; the next is gathered beside."""
        shards = [self[number] for number in range(segment.start, segment.stop)]
        for layer, own, after in zip_longest(segment.layers, shards, shards[1:]):

            def before(
                *_: object, own: FrozenShard = own, after: FrozenShard | None = after
            ) -> None:
                own.gather()
                if after is not None:
                    after.start()

            def afterwards(*_: object, own: FrozenShard = own) -> None:
                own.free()

            layer.register_forward_pre_hook(before)
            layer.register_forward_hook(afterwards)
