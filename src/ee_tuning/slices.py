"""Parameters of which every process of a group has a part, and linear layers that have them.

A split matrix stays an `nn.Linear` with a smaller, ordinary weight, so optimizers and casts need
not know; `ee_tuning.collectives` moves the activations between the parts and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ee_tuning.collectives import Group, gathered, own_part, scattered, summed, used_apart
from ee_tuning.errors import UserError

ROWS, COLUMNS = 0, 1  # of a weight (out, in)
SEQUENCE = 1  # of hidden states (B, T, H)


class Style(NamedTuple):
    """Which dim of a weight is split, and whether each process has all of what the layer is given
    and of what it gives, or its part of the last dim."""

    dim: int
    whole_input: bool
    whole_output: bool


# Those of transformers' plans.
STYLES = {
    "colwise": Style(ROWS, whole_input=True, whole_output=False),
    "colwise_gather_output": Style(ROWS, whole_input=True, whole_output=True),
    "rowwise": Style(COLUMNS, whole_input=False, whole_output=True),
    "rowwise_split_input": Style(COLUMNS, whole_input=True, whole_output=True),
}
SUMMED = "replicated_with_grad_allreduce"  # whole, but each process sees some of its inputs only
HEADS = "heads"  # an attention that counts its heads: it has those of its matrices' parts
Read = Callable[[str, int | None], nn.Parameter]


def head_style(gather: bool) -> Style:
    """How a head is split over the vocabulary; gather: it gives the logits of all parts."""
    return STYLES["colwise_gather_output" if gather else "colwise"]


@dataclass(frozen=True)
class Parallel:
    """How a linear layer is split, and over which processes; copies of the layer share it.

    sequence: a row-wise layer gives this process's part of the sequence, and what a column-wise
    one gets was gathered, with care for its gradient; see `ee_tuning.parallel.sequence`.
    """

    group: Group
    style: Style
    sequence: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Parallel:
        return self


class ParallelLinear(nn.Linear):
    """A linear layer of which this process has some rows or columns."""

    parallel: Parallel

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, M), or as much of either as this process has in the layer's style."""
        group, style, sequence = self.parallel.group, self.parallel.style, self.parallel.sequence
        if style.dim == ROWS:
            x = x if sequence else used_apart(x, group)
            y = self.times(x, self.bias)
            return gathered(y, group, -1) if style.whole_output else y
        if style.whole_input:
            x = own_part(x, group, -1)
        terms = self.times(x)
        y = scattered(terms, group, SEQUENCE) if sequence else summed(terms, group)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product with what this process has of the weight, and a bias."""
        return F.linear(x, self.weight, bias)


class Cut(NamedTuple):
    """A dim along which a tensor is cut, and the processes that have a part each."""

    dim: int
    mesh: DeviceMesh

    def own(self, values: Tensor) -> Tensor:
        """This process's part."""
        return values.chunk(self.mesh.size(), self.dim)[self.mesh.get_local_rank()]

    def gather(self, values: Tensor) -> Tensor:
        """The whole of what every process has a part of."""
        parts = DTensor.from_local(
            values.contiguous(), self.mesh, [Shard(self.dim)], run_check=False
        )
        return parts.full_tensor()


class SplitParameter(nn.Parameter):
    """This process's part of a parameter; otherwise ordinary.

    cuts: one after another, each of what the one before gave. sample: of the whole tensor's values,
    those that tell backbones apart, where only this part was ever in memory; see
    `ee_tuning.loading.tensor_hashes`.
    """

    cuts: tuple[Cut, ...]
    sample: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitParameter:
        copied = type(self)(self.detach().clone(), self.requires_grad)
        copied.__dict__.update(self.__dict__)
        memo[id(self)] = copied
        return copied

    @property
    def whole_shape(self) -> torch.Size:
        """The shape of the parameter that this is a part of."""
        shape = list(self.shape)
        for dim, mesh in self.cuts:
            shape[dim] *= mesh.size()
        return torch.Size(shape)


def split_parameter(
    p: Tensor, dim: int, mesh: DeviceMesh, kind: type[SplitParameter] = SplitParameter
) -> SplitParameter:
    """This process's part of `p`, cut along `dim` into as many as `mesh` has processes.

    `p` may be a part itself.
    """
    cut = Cut(dim, mesh)
    made = kind(cut.own(p.detach()).clone(), p.requires_grad)
    made.cuts = (*_cuts(p), cut)
    return made


def _cuts(p: Tensor) -> tuple[Cut, ...]:
    return p.cuts if isinstance(p, SplitParameter) else ()


def whole(p: Tensor, values: Tensor) -> Tensor:
    """The whole tensor of which `values` is this process's part, split as parameter `p` is."""
    for cut in reversed(_cuts(p)):
        values = cut.gather(values)
    return values


def part(p: Tensor, values: Tensor) -> Tensor:
    """This process's part of `values`, split as parameter `p` is."""
    for cut in _cuts(p):
        values = cut.own(values)
    return values


def read_part(stored: Any, dim: int, mesh: DeviceMesh) -> Tensor:
    """This process's part, cut along `dim`, of a slice of safetensors; the rest is not read."""
    size = stored.get_shape()[dim] // mesh.size()
    first = size * mesh.get_local_rank()
    return stored[(slice(None),) * dim + (slice(first, first + size),)]


def group_of(model: nn.Module) -> Group | None:
    """The processes that its linear layers are split over; None if they are whole."""
    split = (m for m in model.modules() if isinstance(m, ParallelLinear))
    return next((linear.parallel.group for linear in split), None)


def sharing_group(module: nn.Module, device: torch.device) -> Group | None:
    """The same, ready to send each other a little; see `Group.share_memory`."""
    group = group_of(module)
    if group is not None:
        group.share_memory(device)
    return group


def split_linear(
    linear: nn.Module, name: str, style: Style, tp: DeviceMesh, read: Read | None = None
) -> None:
    """Keep this process's part of a linear layer, in place; one that is split already stays.

    read: gives the part of a parameter, cut along a dim or None, where `linear` is on the meta
    device; default: cut it out.

    Raises:
        UserError: it is another kind of layer, or its size is no multiple of the processes.
    """
    if isinstance(linear, ParallelLinear):
        return
    split: Callable[[Style, DeviceMesh], None] | None = getattr(linear, "split", None)
    if not isinstance(linear, nn.Linear) or (type(linear) is not nn.Linear and split is None):
        raise UserError(f"{name} is a {type(linear).__name__}, which cannot be split: use --tp 1")
    dim = style.dim
    if linear.weight.shape[dim] % tp.size():
        raise UserError(f"tp is {tp.size()}: it must divide {name}, {linear.weight.shape[dim]}")
    if split is not None:  # a kind of layer that knows which part of what it keeps is whose
        split(style, tp)
        return
    for key in ("weight", "bias"):
        values = getattr(linear, key)
        split_dim = dim if key == "weight" or dim == ROWS else None
        if values is None:
            continue
        if read is not None:
            linear.register_parameter(key, read(key, split_dim))
        elif split_dim is not None:
            setattr(linear, key, split_parameter(values, split_dim, tp))
    linear.__class__ = ParallelLinear
    linear.parallel = Parallel(Group.of(tp), style)  # type: ignore[assignment]
