"""Matrix products in fp8 (e4m3) with one scale per row, through torch's scaled matmul.

The frozen backbone needs no gradients, so its weights are quantised once and for all. Exits keep
their weights as they are and quantise what goes into a product. On CPU, where there are no fp8
matrix units, weights are rounded to fp8 and products are computed in the activations' dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ee_tuning.collectives import Group
from ee_tuning.slices import ROWS, Parallel, ParallelLinear, Style, split_parameter

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def has_fp8(device: torch.device) -> bool:
    """Whether `device` multiplies fp8 matrices itself: NVIDIA compute capability 8.9 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, K) as fp8 (N, K) and scales (N, 1) in fp32: x ≈ fp8 · scale, row by row."""
    largest = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12)
    # Multiplied by the inverse: dividing every element would take longer than reading it.
    return (x * (LARGEST / largest)).clamp(-LARGEST, LARGEST).to(FP8), largest / LARGEST


def product(x: Tensor, weight: Tensor, scale: Tensor, native: bool) -> Tensor:
    """x (N, K) times the transpose of a quantised weight (M, K), scales (M, 1): (N, M) like x.

    native: use the fp8 matrix units, which need K and M to be multiples of 16.
    """
    if not native:
        return F.linear(x, (weight.float() * scale).to(x.dtype))
    x8, x_scale = quantise(x)
    y = torch._scaled_mm(
        x8, weight.t(), x_scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y.to(x.dtype)


class Fp8Linear(nn.Linear):
    """A frozen linear layer whose weight is kept in fp8: 1 byte per parameter."""

    scale: Tensor
    transposed: Tensor | None
    native: bool

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, M), in x's dtype."""
        return self.times(x, self.bias)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product, and a bias."""
        rows = x.flatten(0, -2)
        if self.transposed is None:
            y = product(rows, self.weight, self.scale, self.native)
        else:
            args = (self.weight, self.transposed, self.scale, self.native)
            y = _FrozenProduct.apply(rows, *args)
        y = y.unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias

    def split(self, style: Style, tp: DeviceMesh) -> None:
        """Keep this process's rows with their scales, or its columns, as they were quantised."""
        size, rank = tp.size(), tp.get_local_rank()

        def own(values: Tensor, dim: int) -> Tensor:
            return values.chunk(size, dim)[rank].clone(memory_format=torch.contiguous_format)

        self.weight = own(self.weight, style.dim)
        if self.transposed is not None:
            self.transposed = own(self.transposed, 1 - style.dim)
        if style.dim == ROWS:
            self.scale = own(self.scale, ROWS)
            if self.bias is not None:
                self.bias = split_parameter(self.bias, ROWS, tp)
        self.__class__ = ParallelFp8Linear
        self.parallel = Parallel(Group.of(tp), style)
        self.native = _native(self)


class ParallelFp8Linear(ParallelLinear, Fp8Linear):
    """One of which this process has some rows or columns.

    What is multiplied with columns is rounded with a scale for this process's part of a row.
    """

    times = Fp8Linear.times


@torch.compiler.allow_in_graph
class _FrozenProduct(torch.autograd.Function):
    """`product`, with a gradient for x: dy·W, whose scales go into dy before it is rounded."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, transposed: Tensor, scale: Tensor, native: bool
    ) -> Tensor:
        ctx.save_for_backward(transposed, scale)
        ctx.native = native
        return product(x, weight, scale, native)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        transposed, scale = ctx.saved_tensors
        ones = torch.ones_like(transposed[:, :1], dtype=torch.float32)
        dy = (grads[0] * scale.t()).to(grads[0].dtype)
        return product(dy, transposed, ones, ctx.native), None, None, None, None


def head_loss(head: Fp8Linear, x: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of a frozen head's logits of x (N, K) on targets (N,), −100 for none."""
    assert head.transposed is not None
    args = head.weight, head.transposed, head.scale, head.native
    return _HeadLoss.apply(x, targets, *args)


@torch.compiler.allow_in_graph
class _HeadLoss(torch.autograd.Function):
    """A frozen head, its loss and the gradient for x at once: the logits' gradient is only ever
    written in fp8, and neither it nor a softmax is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        targets: Tensor,
        weight: Tensor,
        transposed: Tensor,
        scale: Tensor,
        native: bool,
    ) -> Tensor:
        total, dy, dy_scale = loss_and_gradient(product(x, weight, scale, native), targets, scale)
        if native:
            ones = torch.ones_like(transposed[:, :1], dtype=torch.float32).t()
            dx = torch._scaled_mm(
                dy, transposed.t(), dy_scale, ones, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        else:
            dx = F.linear(dy.float() * dy_scale, transposed.float())
        ctx.save_for_backward(dx.to(x.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        return (dx * grads[0]).to(dx.dtype), None, None, None, None, None


def loss_and_gradient(
    logits: Tensor, targets: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy of logits (N, V), and its gradient times `scale` (V, 1), in fp8.

    The gradient, softmax − onehot, is ≈ fp8 (N, V) · (N, 1). The largest value of a row, which
    fp8's scale needs, is found from the logits: exp(max(logit + log scale) − logsumexp), or that of
    the target's own place.
    """
    y, known = logits.float(), targets >= 0
    columns = torch.arange(logits.shape[1], device=targets.device)
    is_target = columns == targets[:, None]
    total = y.logsumexp(-1, keepdim=True)
    at_target = torch.where(is_target, y, 0.0).sum(-1, keepdim=True)
    others = torch.where(is_target, -torch.inf, y + scale.t().log())
    own = scale[targets.clamp(min=0)] * -torch.expm1(at_target - total)
    largest = torch.maximum((others.amax(-1, keepdim=True) - total).exp(), own).clamp(min=1e-12)
    gradient = ((y - total).exp() - is_target.to(y.dtype)) * scale.t()
    gradient = gradient * torch.where(known[:, None], LARGEST / largest, 0.0)
    losses = torch.where(known[:, None], total - at_target, 0.0)
    return losses.sum(), gradient.clamp(-LARGEST, LARGEST).to(FP8), largest / LARGEST


class Fp8TunedLinear(nn.Linear):
    """A linear layer that is tuned, its products in fp8; parameters as `nn.Linear` has them."""

    native: bool

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, M), in autocast's dtype or else x's."""
        return self.times(x, self.bias)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product, and a bias."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        rows, weight = x.flatten(0, -2).to(dtype), self.weight.to(dtype)
        y = _TunedProduct.apply(rows, weight, self.native, rows.requires_grad)
        y = y.unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias.to(dtype)


class ParallelFp8TunedLinear(ParallelLinear, Fp8TunedLinear):
    """One of which this process has some rows or columns, and rounds them with scales of theirs."""

    times = Fp8TunedLinear.times


# Traced as it is: where torch 2.11 compiles the call itself, its gradients are zeros.
@torch.compiler.allow_in_graph
class _TunedProduct(torch.autograd.Function):
    """x·Wᵀ with all three products of forward and backward in fp8.

    deep: whether x needs a gradient; W always does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, native: bool, deep: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.native, ctx.deep = native, deep
        return product(x, *quantise(weight), native)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (dy,) = ctx.saved_tensors, grads
        dx = None
        if ctx.deep:
            dx = product(dy, *quantise(weight.t().contiguous()), ctx.native)
        # Whole blocks of 16 rows, as the matrix units need them; a row of zeros adds nothing.
        pad = (0, 0, 0, -len(x) % 16)
        dy, x = F.pad(dy, pad), F.pad(x, pad)
        dw = product(dy.t().contiguous(), *quantise(x.t().contiguous()), ctx.native)
        return dx, dw, None, None


def freeze_in_fp8(module: nn.Module, backward: bool = False) -> int:
    """Keep the weight of every `nn.Linear` in `module` in fp8, in place; gives their number.

    backward: keep a transposed copy as well, for gradients to pass through.
    """
    linears = [m for m in module.modules() if type(m) is nn.Linear]
    for linear in linears:
        weight, scale = quantise(linear.weight.detach())
        del linear.weight
        linear.__class__ = Fp8Linear
        linear.register_buffer("weight", weight, persistent=False)
        linear.register_buffer("scale", scale, persistent=False)
        linear.register_buffer("transposed", None, persistent=False)
        if backward:
            linear.transposed = weight.t().contiguous()
        linear.native = _native(linear)  # type: ignore[assignment]
    return len(linears)


def tune_in_fp8(module: nn.Module) -> None:
    """Let every `nn.Linear` in `module` compute in fp8 while it is tuned, in place."""
    kinds: dict[Any, Any] = {nn.Linear: Fp8TunedLinear, ParallelLinear: ParallelFp8TunedLinear}
    for linear in [m for m in module.modules() if isinstance(m, nn.Linear) and type(m) in kinds]:
        linear.__class__ = kinds[type(linear)]
        linear.native = _native(linear)  # type: ignore[assignment]


def _native(linear: nn.Linear) -> bool:
    whole = all(size % 16 == 0 for size in linear.weight.shape)
    return has_fp8(linear.weight.device) and whole
