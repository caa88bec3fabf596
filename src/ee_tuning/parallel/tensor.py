"""Tensor parallelism: matrices split over the processes of the tp axis.

Layers are split by the transformers model's own plan, exits as the layers they are copied from,
heads over the vocabulary; `split` has the parts, this the losses over them and who gets which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ee_tuning.backbone import Backbone, plan_of
from ee_tuning.collectives import Group, summed
from ee_tuning.errors import UserError
from ee_tuning.exits import DraftExit, Exit
from ee_tuning.exits.head import as_buffers
from ee_tuning.losses import IGNORED, Softmax
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.sequence import SequencePart, gather_before, regions
from ee_tuning.slices import (
    COLUMNS,
    HEADS,
    STYLES,
    SUMMED,
    ParallelLinear,
    SplitParameter,
    Style,
    head_style,
    split_linear,
)


class SplitSoftmax(Softmax):
    """Softmax over logits of which each process of a group has some, next to each other."""

    def __init__(self, mesh: DeviceMesh, size: int) -> None:
        """size: the whole vocabulary's."""
        self.group = Group.of(mesh)
        self.size = size // self.group.size
        self.start = self.size * self.group.rank

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Of the tokens here: (…, V/tp) → (…, V/tp)."""
        return _LogSoftmax.apply(logits, self.group)

    def normaliser(self, logits: Tensor) -> Tensor:
        """log Σ exp of all processes' logits: (…, V/tp) → (…, 1), without a gradient."""
        largest, total = _normaliser(logits, self.group)
        return (largest + total.log()).unsqueeze(-1)

    def share(self, vocabulary: int) -> int:
        """How many of a vocabulary's logits are here."""
        return vocabulary // self.group.size

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """−log of the targets' probabilities: (N, V/tp), (N,) → (N,), 0 for those ignored."""
        here = (targets >= self.start) & (targets < self.start + self.size)
        places = torch.where(here, targets - self.start, IGNORED)
        return _CrossEntropy.apply(logits, places, targets != IGNORED, self.group)

    def likeliest(self, logits: Tensor) -> Tensor:
        """The first of the largest of all processes' logits: (…, V/tp) → (…) int64."""
        largest, place = logits.max(-1)
        size, none = logits.shape[-1], torch.iinfo(torch.int64).max
        here = largest == self.group.reduce(largest, "max")
        return self.group.reduce((place + size * self.group.rank).where(here, none), "min")

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`."""
        return summed(values, self.group)

    def confidence(self, logits: Tensor) -> Tensor:
        """Largest probability of the full softmax: (…, V/tp) → (…)."""
        return 1 / _normaliser(logits.float(), self.group)[1]


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy over the parts of a group: three numbers per token are sent, none backward.

    Keeps the logits and makes their gradient from them, in one tensor of that size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, labelled: Tensor, group: Group) -> Tensor:
        largest, total = _normaliser(logits, group)
        here = places != IGNORED
        index = places.where(here, 0).unsqueeze(-1)
        chosen = logits.gather(-1, index).squeeze(-1).where(here, 0.0)
        chosen = group.reduce(chosen)
        normaliser = largest + total.log()
        ctx.save_for_backward(logits, normaliser, index, here, labelled)
        return (normaliser - chosen).where(labelled, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, normaliser, index, here, labelled = ctx.saved_tensors
        given = grads[0].where(labelled, 0.0).unsqueeze(-1)
        gradient = (logits - normaliser.unsqueeze(-1)).exp_().mul_(given)
        gradient.scatter_add_(-1, index, -given.where(here.unsqueeze(-1), 0.0))
        return gradient, None, None, None


class _LogSoftmax(torch.autograd.Function):
    """log-softmax over the parts of a group; nothing as large as the logits is sent."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: Group) -> Tensor:
        largest, total = _normaliser(logits, group)
        result = logits - (largest + total.log()).unsqueeze(-1)
        ctx.save_for_backward(result)
        ctx.group = group
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        total = ctx.group.reduce(grads[0].sum(-1, keepdim=True))
        return grads[0] - result.exp() * total, None


def _normaliser(logits: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The largest of all parts' logits, and the sum of exp(logit − largest): (…, V/tp) → (…)."""
    largest = group.reduce(logits.amax(-1), "max")
    return largest, group.reduce((logits - largest.unsqueeze(-1)).exp().sum(-1))


# -- applying it -----------------------------------------------------------------------------------


def split_model(
    model: Network,
    mesh: Mesh,
    teacher: bool,
    *,
    gather: bool = False,
    sequence: bool = False,
) -> None:
    """Split layers, exits and heads of `model`, in place.

    teacher: the backbone's head, too, and the layers that are deeper than the exits.

    gather: heads give the logits of all parts, which is too much for training. sequence: between
    what is split, split the sequence.

    Raises:
        UserError: see `check_splits`, `split_linear` and `regions`.
    """
    if mesh.tp == 1:
        return
    backbone, tp = model.backbone, mesh.axis("tp")
    plan = plan_of(backbone)
    head = head_style(gather)
    exits = [model.exit(layer) for layer in model.exit_layers]
    if teacher:
        for exit in exits:
            exit.output.keep_final(backbone, Group.of(tp))
    if teacher or any(exit.output.shared for exit in exits):
        split_linear(backbone.head, "the head", head, tp)
    runs = range(model.stage.start, backbone.num_layers if teacher else model.stage.stop)
    for number in runs:
        split_layer(backbone.layers[number], plan, tp)
    for exit in exits:
        _split_exit(exit, plan, tp, head)
        exit.output.softmax = SplitSoftmax(tp, exit.output.size)
    if sequence:
        _split_sequence(model, runs, plan, SequencePart(tp))


def _split_exit(exit: Exit, plan: dict[str, str], tp: DeviceMesh, head: Style) -> None:
    for module in exit.layer_parts():
        split_layer(module, exit.splits(plan), tp)
    if not exit.output.shared or exit.output.picked is not None:
        split_linear(exit.output.linear, "an exit's head", head, tp)
    if exit.output.picked is not None:
        as_buffers(exit.output.picked)


def _split_sequence(model: Network, runs: range, plan: dict[str, str], part: SequencePart) -> None:
    """Let layers and exits of `model`, which are split, work on parts of the sequence."""
    model.chain.on_part(part)
    for number in runs:
        _gather_in(model.backbone.layers[number], plan, part)
    for exit in (model.exit(layer) for layer in model.exit_layers):
        exit.sequence = part
        # The terms of its features' gradient are summed once, where these are gathered.
        _let_gather(exit.output.linear)
        if isinstance(exit, DraftExit):  # it looks back: what it reads is gathered
            continue
        _let_gather(exit)
        for module in exit.layer_parts():
            _gather_in(module, plan, part)
        if exit.segment is not None:
            part.prepare(exit.segment)
        if exit.norm is not None:
            _sum_gradients(exit.norm)


def _gather_in(module: nn.Module, plan: dict[str, str], part: SequencePart) -> None:
    """Gather and scatter the sequence around the regions of a layer, or of an exit's part of it."""
    names = regions(plan)
    for name, child in module.named_children():
        if name in names:
            gather_before(child, part)
        else:
            _sum_gradients(child)
    _let_gather(module)


def _let_gather(module: nn.Module) -> None:
    """Tell the split layers in `module` that the sequence is gathered before them."""
    for linear in (m for m in module.modules() if isinstance(m, ParallelLinear)):
        linear.parallel = replace(linear.parallel, sequence=True)
        if linear.parallel.style.dim == COLUMNS and linear.bias is not None:
            linear.bias.summed = True  # type: ignore[attr-defined]


def _sum_gradients(module: nn.Module) -> None:
    """Let the gradients of `module`, which sees other positions elsewhere, be summed over tp."""
    for p in module.parameters():
        p.summed = True  # type: ignore[attr-defined]


def check_splits(backbone: Backbone, tp: int) -> None:
    """Refuse a `tp` that does not divide attention heads or vocabulary. 1 divides everything.

    backbone: may be on the meta device.

    Raises:
        UserError: names what cannot be split; see also `ee_tuning.backbone.layer_plan`.
    """
    if tp == 1:
        return
    config, plan = backbone.config, plan_of(backbone)
    sizes = {"vocab_size": config.vocab_size}
    if any(style == "colwise" and "att" in name for name, style in plan.items()):
        heads = config.num_attention_heads
        sizes |= {"num_attention_heads": heads}
        sizes |= {"num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads}
    for name, size in sizes.items():
        if size % tp:
            raise UserError(f"tp is {tp}: it must divide the backbone's {name}, {size}")


def split_layer(module: nn.Module, plan: dict[str, str], tp: DeviceMesh) -> None:
    """Split what `plan` names in a layer, or in the part of a layer that an exit has."""
    modules = dict(module.named_modules())
    for name, style in plan.items():
        if name not in modules:
            continue
        if style == SUMMED:
            _sum_gradients(modules[name])
        elif style == HEADS:
            _count_heads(modules[name], tp.size())
        else:
            split_linear(modules[name], name, STYLES[style], tp)


def _count_heads(attention: nn.Module, parts: int) -> None:
    """Let an attention that counts its heads count those of this process."""
    config: Any = attention.config
    counts = {"num_heads": config.num_attention_heads}
    counts["num_key_value_heads"] = getattr(config, "num_key_value_heads", None)
    for name, count in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, count // parts)


def total_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The norm of the gradients of `parameters`, the other processes' parts included."""
    alike: dict[tuple[DeviceMesh, ...], list[Tensor]] = {}
    for p in parameters:
        cuts = p.cuts if isinstance(p, SplitParameter) else ()
        alike.setdefault(tuple(cut.mesh for cut in cuts), []).append(p)
    norm = torch.nn.utils.get_total_norm(_gradients(alike.pop((), [])))
    if not alike:
        return norm
    square = norm**2
    for meshes, own in alike.items():
        part = torch.nn.utils.get_total_norm(_gradients(own)) ** 2
        for mesh in meshes:
            dist.all_reduce(part, group=mesh.get_group())
        square = square.to(part.device) + part
    return square.sqrt()


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
