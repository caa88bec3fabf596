"""Sums and gathers over a group of processes, with gradients, that compile.

They call torch's functional collectives, which are nodes of a compiled graph and part of a captured
one; of groups that `share_memory`, those of `ee_tuning.peers` for what is small. Autograd's own
formulas take every process's gradient for a term of a sum; here each function says what its
gradient is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ee_tuning import peers

_OPS: Any = torch.ops._c10d_functional
SHORT = (torch.bfloat16, torch.float16, torch.float32)  # of which fp32 sums lose nothing


@dataclass(frozen=True)
class Group:
    """Processes that work together: their name for torch, how many they are, which this is."""

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Group:
        """That of a mesh of one axis."""
        return cls(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def share_memory(self, device: torch.device) -> None:
        """Let small sums and gathers go by way of the memory of the processes' GPUs from now on,
        if these reach each other's: for what needs no gradient. Every process calls it."""
        peers.share(self.name, device)

    def holds(self, count: int, itemsize: int = 4) -> bool:
        """Whether so many numbers of a process go by way of the GPUs' memory."""
        return peers.holds(self.name, count * itemsize // 4)

    def total(self, parts: Tensor) -> Tensor:
        """(S, …) added up over S, then over the processes in their order, which is always the same:
        (…) fp32, without a gradient."""
        if self.holds(parts[0].numel()):
            return peers.total(parts, self.name)
        own = _added(parts.float())
        return _added(self.gather(own[None], 0))

    def reduce(self, x: Tensor, how: str = "sum") -> Tensor:
        """The sum, or what `how` says, of every process's x, without a gradient."""
        if how == "sum" and x.dtype in SHORT and self.holds(x.numel()):
            return peers.total(x[None], self.name).to(x.dtype)
        return _OPS.wait_tensor(_OPS.all_reduce(x.contiguous(), how, self.name))

    def first(self, x: Tensor) -> Tensor:
        """The x of the first process, on every process, without a gradient."""
        if self.holds(x.numel(), x.dtype.itemsize):
            return peers.gather(x, self.size, self.name)[0]
        return _OPS.wait_tensor(_OPS.broadcast(x.contiguous(), 0, self.name))

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This process's part of x, cut along `dim`, without a copy."""
        return x.chunk(self.size, dim)[self.rank]

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Every process's x, one after another along `dim`, without a gradient."""
        if self.holds(x.numel(), x.dtype.itemsize):
            return torch.cat(peers.gather(x, self.size, self.name).unbind(), dim)
        parts = _OPS.all_gather_into_tensor(x.contiguous(), self.size, self.name)
        parts = _OPS.wait_tensor(parts)
        return parts if dim == 0 else torch.cat(parts.chunk(self.size), dim)

    def scatter(self, x: Tensor, dim: int) -> Tensor:
        """This process's part, along `dim`, of the sum of every process's x, without a gradient."""
        if dim != 0:
            x = torch.cat(x.chunk(self.size, dim))
        parts = _OPS.reduce_scatter_tensor(x.contiguous(), "sum", self.size, self.name)
        return _OPS.wait_tensor(parts)


def _added(terms: Tensor) -> Tensor:
    """The sum of terms (S, …), from the first on."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of every process's x. Its gradient, the same on each, is that of every term."""
    return _Summed.apply(x, group)


def used_apart(x: Tensor, group: Group) -> Tensor:
    """x, the same on every process, for parts that each give a term of its gradient."""
    return _UsedApart.apply(x, group)


def gathered(x: Tensor, group: Group, dim: int, terms: bool = False) -> Tensor:
    """Every process's x, one after another along `dim`.

    terms: each process has a term of the result's gradient; else all have the whole.
    """
    return _Gathered.apply(x, group, dim % x.dim(), terms)


def scattered(x: Tensor, group: Group, dim: int) -> Tensor:
    """This process's part, along `dim`, of the sum of every process's x."""
    return _Scattered.apply(x, group, dim % x.dim())


def own_part(x: Tensor, group: Group, dim: int) -> Tensor:
    """This process's part, along `dim`, of x, which is the same on every process."""
    return _OwnPart.apply(x, group, dim % x.dim())


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.reduce(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _UsedApart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.reduce(grads[0]), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, terms: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.terms = group, dim, terms
        return group.gather(x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group: Group = ctx.group
        if ctx.terms:
            return group.scatter(grads[0], ctx.dim), None, None, None
        return group.own(grads[0], ctx.dim).contiguous(), None, None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return group.scatter(x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.gather(grads[0], ctx.dim), None, None


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return group.own(x, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.gather(grads[0], ctx.dim), None, None
