"""A run of layers as a function from hidden states to hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast

from ee_tuning.backbone.anatomy import Body, attention_name, slice_config
from ee_tuning.backbone.positions import RotaryTable, is_rotary, with_frequencies
from ee_tuning.errors import UserError
from ee_tuning.twin import twin

# What transformers calls a cache: `past_key_values` before 5.24.
CACHE = next(
    name
    for name in inspect.signature(create_masks_for_generate).parameters
    if name in ("cache", "past_key_values")
)


@dataclass
class Call:
    """What the last layer of a segment was called with, and what its attention gave.

    An `mlp` exit runs that layer again from here, with its own MLP and without the attention.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attention: Any = None


@dataclass
class State:
    """The hidden state at an exit layer, and what an exit may need besides.

    hidden: (B, T, H); position_ids: (B, T) int64; call: how the exit layer was called, if
    it was recorded; boundaries: as `Segment` takes them, for attention in the exit. For a draft
    exit, ids: the tokens (B, T), and sources: the hidden states after the layers that it reads.
    stop: the layer, counted from 1, that it is the state after.
    """

    hidden: Tensor
    position_ids: Tensor
    call: Call | None = None
    boundaries: Any = None
    ids: Tensor | None = None
    sources: tuple[Tensor, ...] = ()
    stop: int = 0

    def split(self, lengths: Sequence[int]) -> list[State]:
        """The states of texts that stand one after another in the only row: each (1, T, …), for
        exits to attend within; with the call, if there is one text."""
        parts, stop = [], 0
        for length in lengths:
            start, stop = stop, stop + length
            sources = tuple(source[:, start:stop] for source in self.sources)
            hidden, positions = self.hidden[:, start:stop], self.position_ids[:, start:stop]
            call = self.call if len(lengths) == 1 else None
            parts.append(State(hidden, positions, call, sources=sources, stop=self.stop))
        return parts


class Segment:
    """A run of layers `start`..`stop`-1 (counted from 0) that maps hidden states to hidden states.

    It is the backbone's own trunk with `layers` cut to a slice and the final norm left out. The
    first segment takes token ids, a later one the output of the segment before it.
    """

    def __init__(
        self, body: Body, layers: list[nn.Module], start: int, later: bool, record: bool
    ) -> None:
        """`layers` stand in for those of `body` from `start` on; `record` keeps the last's call."""
        self.start, self.stop = start, start + len(layers)
        self.is_first = not later
        self._body = body
        self._call: Call | None = None
        self._kept: dict[int, Tensor] = {}  # by layer, of the pass in progress
        self._layers = [twin(layer, {}) for layer in layers]
        if record:
            self._layers[-1] = self._recorded(layers[-1])
        parts: dict[str, nn.Module] = {
            body.anatomy.layers: nn.ModuleList(self._layers),
            body.anatomy.norm: nn.Identity(),
        }
        family = body.family
        self.trunk = twin(body.trunk, parts | (family.later_parts if later else {}))
        self.trunk.config = slice_config(body.config, range(self.start, self.stop))
        for name, value in family.later_attributes.items() if later else ():
            setattr(self.trunk, name, value)
        self._trunks: dict[int, nn.Module] = {}  # by the length of texts

    def windows(self) -> list[int | None]:
        """Per layer, how many tokens its sliding window sees; None for all.

        Raises:
            UserError: layers attend within chunks, or keep more than K/V.
        """
        config = self._body.config
        layers = DynamicCache(config=config).layers[self.start : self.stop]
        found = None
        if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
            found = "attends within chunks"
        elif not {*map(type, layers)} <= {DynamicLayer, DynamicSlidingWindowLayer}:
            found = "caches more than keys and values"
        if found:
            raise UserError(
                f"a model of type {config.model_type} {found}: it can be tuned, but not decoded"
            )
        return [getattr(layer, "sliding_window", None) for layer in layers]

    def masks(self, mask_of: Callable[[int], Tensor]) -> Any:
        """A mask for the trunk, from that of each layer, counted from the segment's start.

        Hybrid trunks take one per type of layer.
        """
        types = getattr(self._body.config, "layer_types", None)
        if not types or len(set(types)) == 1:
            return mask_of(0)
        own: list[str] = types[self.start : self.stop]
        return {kind: mask_of(own.index(kind)) for kind in dict.fromkeys(own)}

    def compile(self, cache: Cache | None = None, first: Segment | None = None) -> None:
        """Compile each layer, without its hooks, and the rotary embedding; layers of a kind share
        one graph.

        cache: the one that every call will bring. A layer then sees only its own part of it: its
        number would be a constant of the graph. first: the segment that is compiled first, of which
        others take the rotary tables, where they are given the same tensor of positions.
        """
        for i, layer in enumerate(self._layers):
            layer.forward = torch.compile(layer.forward, dynamic=False)
            if cache is not None:
                layer.forward = _with_cache(layer.forward, cache.layers[i])
        for name, module in list(self.trunk.named_children()):
            if first not in (None, self) and is_rotary(module):
                self.trunk._modules[name] = first.trunk._modules[name]
            elif is_rotary(module) or isinstance(module, RotaryTable):
                own = twin(module, {})
                own.forward = _once(own, torch.compile(own.forward, dynamic=False))
                self.trunk._modules[name] = own

    def look_up_positions(self, number: int) -> None:
        """Let the rotary embedding be a table of so many positions, where it is one for all texts:
        to compute it takes longer than a step of one layer has for it."""
        for name, module in list(self.trunk.named_children()):
            if RotaryTable.serves(module):
                like = torch.empty(0, dtype=self._body.dtype, device=self._body.device)
                self.trunk._modules[name] = RotaryTable(module, number, like)

    def keep_positions(self, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Once compiled, let tables of positions have what they say of this tensor of them, (B, T),
        in memory that the caller fills: each table, and its memory. None, if some say nothing."""
        modules = [*self.trunk.children()]
        if any(is_rotary(one) for one in modules):
            return []
        tables = [one for one in modules if isinstance(one, RotaryTable)]
        return [pair for table in tables for pair in table.keep(position_ids)]

    def keep(self, layers: Collection[int]) -> None:
        """Let a `State` have the hidden states after those of `layers` that it runs as `sources`.

        layers: counted from 1. Compiled layers do, too: their hooks run outside.
        """
        for number, layer in enumerate(self._layers, self.start + 1):
            if number in layers:
                layer.register_forward_hook(self._keeper(number))

    def _keeper(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._kept[number] = output[0] if isinstance(output, tuple) else output

        return keep

    @property
    def layers(self) -> list[nn.Module]:
        """The layers it runs, twins of the backbone's."""
        return self._layers

    def __call__(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        cache: Cache | None = None,
        boundaries: Any = None,
    ) -> State:
        """Run the layers on token ids (B, T) or hidden states (B, T, H).

        cache: has a part for each layer of the segment, at the layer's number counted from the
        model's start, and may have `longest_text`, the length that all its texts are taken to have
        where rotary frequencies depend on it. Without one, positions that start again mark packed
        documents, which do not see each other. boundaries: what attention is told in place of
        transformers' own mask: see `ee_tuning.varlen` and `masks`.
        """
        mask = boundaries
        if mask is None and cache is None and not self._body.family.masks_packing:
            mask = self._packing_mask(inputs, position_ids)
        name = "input_ids" if self.is_first else "inputs_embeds"
        output = self._trunk_for(getattr(cache, "longest_text", None))(
            **{name: inputs},
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=cache is not None,
            **{CACHE: cache},
        )
        call, self._call = self._call, None
        sources = tuple(self._kept[number] for number in sorted(self._kept))
        self._kept.clear()
        hidden = output.last_hidden_state
        return State(hidden, position_ids, call, boundaries, sources=sources, stop=self.stop)

    def _trunk_for(self, length: int | None) -> nn.Module:
        """The trunk with the rotary frequencies of texts of `length`; None: of what it is given."""
        if length is None:
            return self.trunk
        if length not in self._trunks:
            long = self._body.is_long(length)
            self._trunks[length] = with_frequencies(self.trunk, length if long else 1)
        return self._trunks[length]

    def _packing_mask(self, inputs: Tensor, position_ids: Tensor) -> Any:
        """The masks of packed documents, for trunks that do not pass positions to theirs."""
        shape_only = torch.empty(*inputs.shape[:2], 1, device=inputs.device, dtype=self._body.dtype)
        return create_masks_for_generate(
            config=self.trunk.config,  # type: ignore[arg-type]
            inputs_embeds=shape_only,
            attention_mask=None,
            **{CACHE: None},
            position_ids=position_ids,
        )

    def _recorded(self, layer: nn.Module) -> nn.Module:
        """A twin of `layer` that leaves its call and its attention's output in `self._call`."""
        name = attention_name(layer)
        kept = _Kept(layer.get_submodule(name))
        recorded = twin(layer, {name: kept})

        def keep_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._call = Call(args, kwargs)

        def keep_attention(_: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
            assert self._call is not None
            self._call.attention, kept.output = kept.output, None

        recorded.register_forward_pre_hook(keep_call, with_kwargs=True)
        recorded.register_forward_hook(keep_attention)
        return recorded


def _with_cache(forward: Callable[..., Any], own: Any) -> Callable[..., Any]:
    """A layer's forward that gets `own` where the trunk gives it the whole cache."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = {k: own if isinstance(v, Cache) else v for k, v in kwargs.items()}
        return forward(*args, **given)

    return call


def _once(module: nn.Module, rotary: Callable[..., Any]) -> Callable[..., Any]:
    """A rotary embedding's forward that gives the tables of the last positions again, and of those
    that it keeps."""
    last: Tensor | None = None
    found: dict[Any, Any] = {}  # by the kind of layer, where there are several

    def call(x: Tensor, position_ids: Tensor, *kind: Any, **named: Any) -> Any:
        nonlocal last
        kept = getattr(module, "kept", None)
        if kept is not None and kept[0] is position_ids:
            return kept[1]
        if last is not position_ids:
            last = position_ids
            found.clear()
        key = (*kind, *named.values())
        if key not in found:
            found[key] = rotary(x, position_ids, *kind, **named)
        return found[key]

    return call


class _Kept(nn.Module):
    """An attention that keeps what it gave. (A hook would be lost in compiled code.)"""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.attention(*args, **kwargs)
        return self.output


class _TrunkOutput(BaseModelOutputWithPast):
    """A trunk's output in which whatever a family adds (router logits, …) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class Passthrough(nn.Module):
    """In place of the trunk: hands `inputs_embeds` on to the head, through a norm, if any."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        """The hidden states as a trunk's output."""
        return _TrunkOutput(last_hidden_state=self.norm(inputs_embeds))
