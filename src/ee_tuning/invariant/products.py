"""Products with frozen weights, and activations: a row does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from ee_tuning.collectives import Group
from ee_tuning.devices import free_memory
from ee_tuning.fingerprint import state_of
from ee_tuning.slices import COLUMNS, ParallelLinear

try:  # comes with torch for CUDA alone
    from ee_tuning.invariant import kernels
except ImportError:
    kernels = None  # type: ignore[assignment]

ONEDNN = "_linear_pointwise"  # torch's name for oneDNN's product
MOST_ROOM = 4  # times what is copied must be free: twice that, and as much for the rest
BLOCK = 16_384  # numbers that torch gives one thread, whatever the activation, if there are no more
LANES = 64  # numbers that torch computes at a time, or a multiple
SHARED = 8  # tokens of a product that oneDNN's order of the weights is chosen for
# Tokens of a product on a CPU at least: of one alone it is another product, and with AVX-512 oneDNN
# reads the weights more slowly for two than for four.
LEAST = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 2

ACTIVATIONS: Any = tuple(
    {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
)

# What was made of layers before: engines of a model share it.
_made: WeakKeyDictionary[nn.Module, tuple[Any, list[Weights]]] = WeakKeyDictionary()


def can_multiply(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is such a product: by Triton on CUDA, by oneDNN on a CPU that has the dtype."""
    if device.type == "cuda":
        return kernels is not None and dtype in (torch.float16, torch.bfloat16, torch.float32)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    mkldnn: Any = torch.ops.mkldnn
    supported = {
        torch.float32: lambda: True,
        torch.bfloat16: mkldnn._is_mkldnn_bf16_supported,
        torch.float16: mkldnn._is_mkldnn_fp16_supported,
    }
    return hasattr(mkldnn, ONEDNN) and dtype in supported and bool(supported[dtype]())


def matrix(linear: Any) -> Tensor:
    """The weights of a linear layer as (N, K), of which GPT-2's layers have the transpose."""
    weight: Tensor = linear.weight.detach()
    return weight if isinstance(linear, nn.Linear) else weight.t().contiguous()


class Weights:
    """The weights (N, K) of linear layers that are given the same input, for one product.

    sizes: N of each layer.

    On CUDA the layers' own weights are laid side by side in memory, their values as they were; on a
    CPU there is a copy in the order that oneDNN reads, if it is `packed`.
    """

    def __init__(self, linears: Sequence[nn.Module], packed: bool) -> None:
        matrices = [matrix(linear) for linear in linears]
        # Of a layer split by columns the terms are added up before its bias.
        biases: list[Any] = [None if by_columns(one) else one.bias for one in linears]
        self.sizes = [len(one) for one in matrices]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            like = matrices[0]
            self.bias = torch.cat([
                like.new_zeros(size) if bias is None else bias.detach()
                for size, bias in zip(self.sizes, biases, strict=True)
            ])  # fmt: skip
        whole = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        self.on_cpu = whole.device.type == "cpu"
        if packed:
            whole = torch.ops.mkldnn._reorder_linear_weight(whole, SHARED)
        elif len(matrices) > 1 and all(isinstance(linear, nn.Linear) for linear in linears):
            for linear, part in zip(linears, whole.split(self.sizes), strict=True):
                linear.weight.data = part
        self.matrix = whole

    def times(self, x: Tensor) -> Tensor:
        """x (…, K) → (…, N)."""
        if self.on_cpu:
            copies = -(-LEAST * x.shape[-1] // x.numel())
            given = x.expand(copies, *x.shape).contiguous() if copies > 1 else x
            multiply: Any = torch.ops.mkldnn._linear_pointwise.default
            y = multiply(given, self.matrix, self.bias, "none", [], "")
            return y[0] if copies > 1 else y
        parts = self.terms(x)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        if self.bias is not None:
            total = total + self.bias
        return total.to(x.dtype).view(*x.shape[:-1], -1)

    def terms(self, x: Tensor) -> Tensor:
        """x (…, K) → (S, M, N), of M tokens, to be added up over S parts of K and, with --tp, over
        the processes; on CUDA fp32."""
        if self.on_cpu:
            return self.times(x).reshape(1, -1, sum(self.sizes))
        return kernels.product(x.reshape(-1, x.shape[-1]).contiguous(), self.matrix)


class Product(nn.Module):
    """In place of a linear layer.

    Of several that share `weights` the first to be called computes all of them; `place` is this
    one's among them.
    """

    def __init__(self, weights: Weights, place: int, others: list[Any]) -> None:
        """others: what was computed for layers that have not asked yet, shared by them: the input,
        and the results by place."""
        super().__init__()
        self.weights, self.place, self.others = weights, place, others

    def forward(self, x: Tensor) -> Tensor:
        """x (…, K) → (…, N)."""
        sizes = self.weights.sizes
        if len(sizes) == 1:
            return self.weights.times(x)
        if self.others and self.others[0] is x and self.others[1][self.place] is not None:
            results = self.others[1]
        else:
            results = list(self.weights.times(x).split_with_sizes(sizes, -1))
            self.others[:] = [x, results]
        found, results[self.place] = results[self.place], None
        if all(one is None for one in results):
            self.others.clear()
        return found


class Summed(nn.Module):
    """In place of a linear layer split by columns: adds up the terms of all processes, in order."""

    def __init__(self, weights: Weights, linear: ParallelLinear) -> None:
        super().__init__()
        self.weights, self.parallel = weights, linear.parallel
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x (…, K/tp), or (…, K) where the layer is given that, → (…, N)."""
        group = self.parallel.group
        if self.parallel.style.whole_input:
            x = group.own(x, -1)
        y = group.total(self.weights.terms(x))
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class Gathered(nn.Module):
    """Behind the product of a layer split by rows: gathers what the processes have of the result.

    own: gives this one's part, (…, N/tp).
    """

    def __init__(self, own: nn.Module, group: Group) -> None:
        super().__init__()
        self.own, self.group = own, group

    def forward(self, x: Tensor) -> Tensor:
        """x (…, K) → (…, N)."""
        return self.group.gather(self.own(x), -1)


class InBlocks(nn.Module):
    """An activation, a block of tokens at a time, each token of whole vectors.

    Torch cuts larger ones between threads wherever that may be, and computes what is left behind
    the last whole vector one by one, with other last bits.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x (…, N) → (…, N)."""
        width = x.shape[-1]
        if width % LANES:
            return self.forward(F.pad(x, (0, -width % LANES)))[..., :width]
        x = x.contiguous()  # what is not has other kernels, but if it is of one token
        if x.numel() <= BLOCK:
            y: Tensor = self.activation(x)
            return y
        blocks = x.flatten(0, -2).split(max(1, BLOCK // width))
        return torch.cat([self.activation(block) for block in blocks]).view(x.shape)


def is_activation(module: nn.Module) -> bool:
    """Whether it is one of transformers', without weights."""
    return isinstance(module, ACTIVATIONS) and not any(True for _ in module.parameters())


def by_columns(linear: nn.Module) -> bool:
    """Whether it is split over processes such that each has a term of what it gives."""
    return isinstance(linear, ParallelLinear) and linear.parallel.style.dim == COLUMNS


def products(linears: Sequence[nn.Module]) -> list[nn.Module]:
    """Stand-ins for linear layers that are given the same input, or for one; those that are
    `by_columns` come alone."""
    found: list[nn.Module] = []
    for weights in _weights(linears):
        others: list[Any] = []
        found += [Product(weights, place, others) for place in range(len(weights.sizes))]
    return [_with_others(*both) for both in zip(linears, found, strict=True)]


def _with_others(linear: nn.Module, own: Any) -> nn.Module:
    """A product, of a layer that may be split with what the other processes have of it."""
    if not isinstance(linear, ParallelLinear):
        return own
    if by_columns(linear):
        return Summed(own.weights, linear)
    style, group = linear.parallel.style, linear.parallel.group
    return Gathered(own, group) if style.whole_output else own


@torch.no_grad()
def _weights(linears: Sequence[nn.Module]) -> list[Weights]:
    """Those of layers; made anew where theirs lie elsewhere or have changed since."""
    kept = _made.get(linears[0])
    if kept is None or kept[0] != _state(linears):
        weights = _together(linears)
        kept = _made[linears[0]] = (_state(linears), weights)
    return kept[1]


def _together(linears: Sequence[Any]) -> list[Weights]:
    """One for all layers; each one's own on a CPU without memory for two copies, one of which is
    there for a while. On CUDA the one replaces the layers' own."""
    device = linears[0].weight.device
    if device.type != "cpu":
        return [Weights(linears, packed=False)]
    free = free_memory(device)
    if free is None or free > MOST_ROOM * sum(linear.weight.nbytes for linear in linears):
        return [Weights(linears, packed=True)]
    return [Weights([linear], packed=False) for linear in linears]


def _state(linears: Sequence[Any]) -> list[tuple[Any, ...]]:
    """That of their weights and biases, by every value: of a small change rounding leaves few."""
    tensors = [one for linear in linears for one in (linear.weight, linear.bias)]
    return [state_of(one, every_value=True) for one in tensors if one is not None]
