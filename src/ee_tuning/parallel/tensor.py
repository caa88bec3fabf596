"""Tensor parallelism: matrices split over the processes of the tp axis.

Layers are split by the transformers model's own plan, exits as the layers they are copied from,
heads over the vocabulary. A split matrix stays an `nn.Linear` with a smaller, ordinary weight, so
optimizers and casts need not know; DTensor moves the activations between the parts and back,
gradients included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ee_tuning.backbone import Backbone
from ee_tuning.errors import UserError
from ee_tuning.exits import Exit
from ee_tuning.losses import Softmax
from ee_tuning.model import EarlyExitModel
from ee_tuning.parallel.mesh import Mesh

ROWS, COLUMNS = 0, 1  # of a weight (out, in)
# The styles of transformers' plans: which dim of the weight is split, and how input and output
# lie before and after.
Style = tuple[int, Placement, Placement]
STYLES: dict[str, Style] = {
    "colwise": (ROWS, Replicate(), Shard(-1)),
    "colwise_gather_output": (ROWS, Replicate(), Replicate()),
    "rowwise": (COLUMNS, Shard(-1), Replicate()),
    "rowwise_split_input": (COLUMNS, Replicate(), Replicate()),
}
SUMMED = "replicated_with_grad_allreduce"  # whole, but each process sees some of its inputs only


class ParallelLinear(nn.Linear):
    """A linear layer of which this process has some rows or columns."""

    mesh: DeviceMesh
    style: Style

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, M), or as much of either as this process has in the layer's style."""
        dim, before, after = self.style
        if dim == ROWS:
            x = _to_parts(x, self.mesh)
            y = F.linear(x, self.weight, self.bias)
            return y if after.is_shard() else _move(y, self.mesh, Shard(-1), Replicate())
        if before.is_replicate():
            x = _move(x, self.mesh, Replicate(), Shard(-1))
        y = _move(F.linear(x, self.weight), self.mesh, Partial(), Replicate())
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _move(x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement) -> Tensor:
    """`x` from one placement to another; its gradient goes the other way."""
    moved = DTensor.from_local(x, mesh, [have], run_check=False).redistribute(placements=[want])
    return moved.to_local()


def _to_parts(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`x` as it is, for parts that each give a term of its gradient."""
    given = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return given.to_local(grad_placements=[Partial()])


class SplitSoftmax(Softmax):
    """Softmax over logits of which each process of a group has some, next to each other."""

    def __init__(self, mesh: DeviceMesh, size: int) -> None:
        """size: the whole vocabulary's."""
        self.mesh, self.group = mesh, mesh.get_group()
        self.size = size // mesh.size()
        self.start = self.size * mesh.get_local_rank()

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Of the tokens here: (…, V/tp) → (…, V/tp)."""
        return _LogSoftmax.apply(logits, self.group)

    def places(self, labels: Tensor, ignored: int) -> Tensor:
        """Labels as places among the logits here, `ignored` where they are elsewhere."""
        here = (labels >= self.start) & (labels < self.start + self.size)
        return torch.where(here, labels - self.start, ignored)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`."""
        return _move(values, self.mesh, Partial(), Replicate())

    def confidence(self, logits: Tensor) -> Tensor:
        """Largest probability of the full softmax: (…, V/tp) → (…)."""
        return 1 / _normaliser(logits.float(), self.group)[1]


class _LogSoftmax(torch.autograd.Function):
    """log-softmax over the parts of a group; nothing as large as the logits is sent."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        largest, total = _normaliser(logits, group)
        result = logits - (largest + total.log()).unsqueeze(-1)
        ctx.save_for_backward(result)
        ctx.group = group
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        total = grads[0].sum(-1, keepdim=True)
        dist.all_reduce(total, group=ctx.group)
        return grads[0] - result.exp() * total, None


def _normaliser(logits: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The largest of all parts' logits, and the sum of exp(logit − largest): (…, V/tp) → (…)."""
    largest = logits.amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    total = (logits - largest.unsqueeze(-1)).exp().sum(-1)
    dist.all_reduce(total, group=group)
    return largest, total


# -- applying it -----------------------------------------------------------------------------------


def split_model(model: EarlyExitModel, mesh: Mesh, teacher: bool) -> None:
    """Split layers, exits and heads of `model`, in place; teacher: the backbone's head too.

    Raises:
        UserError: see `check_splits` and `_split`.
    """
    if mesh.tp == 1:
        return
    backbone, tp = model.backbone, mesh.axis("tp")
    plan = layer_plan(backbone)
    exits = [model.exit(layer) for layer in model.exit_layers]
    if teacher or any(exit.spec.head == "shared" for exit in exits):
        _split(backbone.head, "the head", STYLES["colwise"], tp)
    for number in model.stage:
        layer = backbone.layers[number]  # type: ignore[index]
        _split_by_plan(layer, plan, tp)
    for exit in exits:
        _split_exit(exit, plan, tp, backbone.config.vocab_size)


def _split_exit(exit: Exit, plan: dict[str, str], tp: DeviceMesh, vocabulary: int) -> None:
    if exit.spec.arch == "mlp":
        _split_by_plan(exit.mlp, plan, tp)
    if exit.spec.arch == "layer":
        _split_by_plan(exit.block, plan, tp)
    for name in ("head", "reduced"):
        if hasattr(exit, name):
            _split(getattr(exit, name), "an exit's head", STYLES["colwise"], tp)
    exit.softmax = SplitSoftmax(tp, vocabulary if exit.tokens is None else len(exit.tokens))


def layer_plan(backbone: Backbone) -> dict[str, str]:
    """Style of each module of a layer, by its path in the layer, from transformers' own plan.

    Raises:
        UserError: the model has none, or one with styles of which this knows nothing.
    """
    name = type(backbone.model).__name__
    whole = getattr(backbone.config, "base_model_tp_plan", None) or {}
    prefix = f"{backbone.anatomy.layers}.*."
    plan = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
    unknown = sorted(set(plan.values()) - {*STYLES, SUMMED})
    if not plan or unknown:
        reason = f"uses {', '.join(unknown)}" if unknown else "does not exist"
        raise UserError(
            f"transformers' tensor-parallel plan for {name} {reason}: use --tp 1, with --dp or --pp"
        )
    return plan


def check_splits(config: Any, plan: dict[str, str], tp: int) -> None:
    """Refuse a `tp` that does not divide attention heads or vocabulary.

    Raises:
        UserError: names what cannot be split.
    """
    sizes = {"vocab_size": config.vocab_size}
    if any(style == "colwise" and "att" in name for name, style in plan.items()):
        heads = config.num_attention_heads
        sizes |= {"num_attention_heads": heads}
        sizes |= {"num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads}
    for name, size in sizes.items():
        if size % tp:
            raise UserError(f"tp is {tp}: it must divide the backbone's {name}, {size}")


def _split_by_plan(module: nn.Module, plan: dict[str, str], tp: DeviceMesh) -> None:
    """Split what `plan` names in a layer, or in the part of a layer that an exit has."""
    modules = dict(module.named_modules())
    for name, style in plan.items():
        if name not in modules:
            continue
        if style == SUMMED:
            for p in modules[name].parameters():
                p.summed = True
        else:
            _split(modules[name], name, STYLES[style], tp)


def _split(linear: nn.Module, name: str, style: Style, tp: DeviceMesh) -> None:
    """Keep this process's part of a linear layer, in place.

    Raises:
        UserError: it is another kind of layer, or its size is no multiple of the processes.
    """
    if type(linear) is not nn.Linear:
        raise UserError(f"{name} is a {type(linear).__name__}, which cannot be split: use --tp 1")
    dim = style[0]
    if linear.weight.shape[dim] % tp.size():
        raise UserError(f"tp is {tp.size()}: it must divide {name}, {linear.weight.shape[dim]}")
    linear.__class__ = ParallelLinear
    linear.mesh, linear.style = tp, style  # type: ignore[assignment]
    linear.weight = split_parameter(linear.weight, dim, tp)
    if linear.bias is not None and dim == ROWS:
        linear.bias = split_parameter(linear.bias, ROWS, tp)


# -- parameters that are split ---------------------------------------------------------------------


class SplitParameter(nn.Parameter):
    """This process's part of a parameter that is split along `split_dim`; otherwise ordinary."""

    split_dim: int
    mesh: DeviceMesh


def split_parameter(
    p: Tensor, dim: int, mesh: DeviceMesh, kind: type[SplitParameter] = SplitParameter
) -> SplitParameter:
    """This process's part of `p`, cut along `dim` into as many as `mesh` has processes."""
    values = p.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
    local = kind(values, p.requires_grad)
    local.split_dim, local.mesh = dim, mesh
    return local


def whole(p: Tensor, values: Tensor) -> Tensor:
    """The whole tensor of which `values` is this process's part, split as parameter `p` is."""
    if not isinstance(p, SplitParameter):
        return values
    placements = [Shard(p.split_dim)]
    parts = DTensor.from_local(values.contiguous(), p.mesh, placements, run_check=False)
    return parts.full_tensor()


def part(p: Tensor, values: Tensor) -> Tensor:
    """This process's part of `values`, split as parameter `p` is."""
    if not isinstance(p, SplitParameter):
        return values
    return values.chunk(p.mesh.size(), p.split_dim)[p.mesh.get_local_rank()]


def total_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The norm of the gradients of `parameters`, the other processes' parts included."""
    split = [p for p in parameters if isinstance(p, SplitParameter)]
    rest = [p for p in parameters if not isinstance(p, SplitParameter)]
    norm = torch.nn.utils.get_total_norm(_gradients(rest))
    if not split:
        return norm
    square = torch.nn.utils.get_total_norm(_gradients(split)) ** 2
    dist.all_reduce(square, group=split[0].mesh.get_group())
    return (norm.to(square.device) ** 2 + square).sqrt()


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
