"""Layers of a backbone with the products and the attention of this package for their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ee_tuning import grouped
from ee_tuning.backbone import Backbone, Segment, attention_name, in_memory
from ee_tuning.errors import UserError
from ee_tuning.exits import DraftExit, Exit
from ee_tuning.invariant.attention import NAME
from ee_tuning.invariant.products import InBlocks, can_multiply, is_activation, products
from ee_tuning.slices import ParallelLinear
from ee_tuning.twin import twin

# What the families call linear layers that are given the same input.
TOGETHER = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


class Invariant:
    """Twins of a backbone's layers whose results for a token do not depend on what is beside it.

    missing: why that cannot be had, None where it can. beside: whether whole texts can stand side
    by side in a pass, too.
    """

    def __init__(self, backbone: Backbone, compiled: bool = False) -> None:
        """compiled: whether the twins will be."""
        self.missing = _missing(backbone, compiled)
        self._backbone = backbone
        # On CUDA the products are made for few tokens.
        self.beside = self.missing is None and backbone.device.type == "cpu"

    @staticmethod
    def padding(tokens: int) -> int:
        """How many to add to so many tokens of whole texts. A CPU's library makes a product for
        each number of tokens that it meets, of half a megabyte: so there are few."""
        step = max(4, (1 << tokens.bit_length()) // 8)
        return -tokens % step

    def layer(self, layer: nn.Module) -> nn.Module:
        """The twin of a layer, or the layer where that cannot be had."""
        return layer if self.missing else _twin(layer)

    def final(self) -> nn.Module:
        """The final exit; call it with ``inputs_embeds=hidden``, as `Backbone.output`."""
        backbone = self._backbone
        there = in_memory(backbone.head) and not self.missing
        head = products([backbone.head])[0] if there else backbone.head
        return backbone.output(head, backbone.norm)

    def exit(self, exit: Exit, cache: Any = None, positions: int = 0) -> Exit:
        """The twin of an exit, or the exit where that cannot be had. cache: for its own layer.
        positions: if more than 0, how many are looked up there.

        Of products of few tokens those of one order are the faster ones, too.
        """
        linear, backbone = exit.output.linear, self._backbone
        if not (_is_linear(linear) and can_multiply(backbone.device, linear.weight.dtype)):
            return exit
        if self.missing:
            return exit
        # Else the mask of its own layer hides some of what a text's tokens see.
        attends = not isinstance(exit, DraftExit) or exit.sees_first
        parts = {path: one for path, one in _products(exit).items() if path[:6] != "block."}
        head, change = products([linear])[0], _twin if attends else _with_products
        own = exit.twin(backbone, parts, head, change)
        if own.segment is not None and positions:
            own.segment.look_up_positions(positions)
        if own.segment is not None and attends:
            self.attach([own.segment], [cache])
        return own

    def attach(self, segments: Sequence[Segment], caches: Sequence[Any]) -> None:
        """Let the attention of twins look at its K/V: of each segment a cache of `slot_layers`."""
        for segment, cache in zip(segments, caches, strict=True) if not self.missing else ():
            for layer, own in zip(segment.layers, cache.slot_layers, strict=True):
                own.whole = True
                for module in layer.modules():
                    if hasattr(module, "kept"):
                        module.kept = own


def _missing(backbone: Backbone, compiled: bool) -> str | None:
    device, dtype = backbone.device, backbone.dtype
    if not can_multiply(device, dtype):
        return f"{dtype} on this {device.type} has no product of one order"
    if compiled and device.type == "cpu":
        return "layers are compiled for a CPU"
    if getattr(backbone.config, "_attn_implementation", None) == grouped.NAME:
        return "it attends so that many texts are written fast"
    if not getattr(backbone.model, "_supports_attention_backend", False):
        return f"{type(backbone.model).__name__} attends by itself"
    if in_memory(backbone.head) and not _is_linear(backbone.head):
        return f"the head is a {type(backbone.head).__name__}"
    for layer in filter(in_memory, backbone.layers):
        try:
            attention = layer.get_submodule(attention_name(layer))
        except UserError:
            return f"{type(layer).__name__} has no attention of a known kind"
        if not hasattr(attention, "config"):
            return f"{type(attention).__name__} attends by itself"
        for module in layer.modules():
            own = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
            if own and not _is_linear(module):
                return f"{type(module).__name__} multiplies in its own way"
    return None


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a plain linear layer, or a part of one, and all that it does is that."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) in (nn.Linear, Conv1D, ParallelLinear) and not hooks


def _twin(layer: nn.Module) -> nn.Module:
    name = attention_name(layer)
    attention = twin(layer.get_submodule(name), {})
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = NAME  # type: ignore[union-attr]
    attention.kept = None  # type: ignore[assignment]
    return twin(layer, {name: attention, **_products(layer)})


def _with_products(layer: nn.Module) -> nn.Module:
    return twin(layer, _products(layer))


def _products(module: nn.Module) -> dict[str, nn.Module]:
    """By path, what stands in for the linear layers of a module."""
    linears = {path: one for path, one in module.named_modules() if _is_linear(one)}
    parts: dict[str, nn.Module] = {}
    for path in linears:
        if path in parts:
            continue
        parent, _, name = path.rpartition(".")
        alike = next((names for names in TOGETHER if name in names), (name,))
        paths = [f"{parent}.{one}" if parent else one for one in alike]
        if not all(one in linears for one in paths):
            paths = [path]
        parts |= zip(paths, products([linears[one] for one in paths]), strict=True)
    if any(p.device.type == "cpu" for p in module.parameters()):
        named = module.named_modules()
        parts |= {path: InBlocks(one) for path, one in named if is_activation(one)}
    return parts
