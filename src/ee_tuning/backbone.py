"""The backbone: any dense decoder-only causal LM of transformers, cut into segments.

Nothing here knows a model family, except for the few lines of `FAMILIES`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast

from ee_tuning.errors import UserError, first_line
from ee_tuning.twin import twin

# What transformers calls a cache: `past_key_values` before 5.24.
CACHE = next(
    name
    for name in inspect.signature(create_masks_for_generate).parameters
    if name in ("cache", "past_key_values")
)


class Zero(nn.Module):
    """In place of a learned position embedding: later segments have it in their input already."""

    def forward(self, first: Any = None, *_: Any, position_ids: Any = None, **__: Any) -> Tensor:
        """A zero that broadcasts, where the positions are, which come first or by name."""
        positions = first if position_ids is None else position_ids
        return torch.zeros((), device=positions.device)


@dataclass(frozen=True)
class Family:
    """What the generic path cannot see about a model family.

    later_parts: parts of the trunk to replace in every segment but the first.
    later_attributes: attributes of the trunk to set in every segment but the first.
    masks_packing: the trunk keeps packed documents apart by itself, from `position_ids`.
    positions_end: they are learned, so there are none beyond the context.
    """

    later_parts: dict[str, nn.Module] = field(default_factory=dict)
    later_attributes: dict[str, Any] = field(default_factory=dict)
    masks_packing: bool = True
    positions_end: bool = False


FAMILIES: dict[str, Family] = {
    "gpt2": Family(later_parts={"wpe": Zero()}, positions_end=True),
    "gpt_bigcode": Family(later_parts={"wpe": Zero()}, positions_end=True),
    "biogpt": Family(
        later_parts={"embed_positions": Zero()}, masks_packing=False, positions_end=True
    ),
    "opt": Family(later_parts={"embed_positions": Zero()}, masks_packing=False, positions_end=True),
    "granite": Family(later_attributes={"embedding_multiplier": 1.0}),
    "falcon": Family(masks_packing=False),
    "gpt_oss": Family(masks_packing=False),
    "afmoe": Family(masks_packing=False),
    "mpt": Family(masks_packing=False),
}


@dataclass(frozen=True)
class Anatomy:
    """Where a causal LM keeps its parts: dotted paths from the model, or from the trunk.

    The *trunk* is the module that owns the layers and runs them.
    """

    trunk: str
    layers: str
    norm: str
    head: str


def check_unquantised(config: Any, name: str) -> None:
    """Refuse a backbone whose weights are stored or loaded quantised.

    Raises:
        UserError: how it is quantised, and what to use instead.
    """
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise UserError(
            f"{name} is quantised ({getattr(method, 'value', method)}), and exits start from full "
            "precision: give the checkpoint it was made from, with --backbone-precision bnb-4bit, "
            "say, if memory is short"
        )


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a causal LM by what they are, not by what they are called.

    Raises:
        UserError: the model is an encoder-decoder, has no output head, its layers or final norm
            are not where a decoder-only model has them, or some layers are recurrent.
    """
    config = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder model: exits need a decoder-only causal LM")
    check_unquantised(config, name)
    head = model.get_output_embeddings()
    if head is None or not hasattr(config, "num_hidden_layers"):
        raise UserError(f"{name} is not a causal LM: it has no output head over a vocabulary")
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not lists:
        raise UserError(f"{name} has no list of {config.num_hidden_layers} decoder layers")
    trunk, _, layers = lists[0].rpartition(".")
    norms = [
        path
        for path, module in model.get_submodule(trunk).named_children()
        if "norm" in type(module).__name__.lower()
    ]
    if not norms:
        raise UserError(f"{name} has no final norm after its layers: exits need a pre-norm model")
    caches = DynamicCache(config=config).layers
    if model._is_stateful or any(isinstance(c, LinearAttentionCacheLayerMixin) for c in caches):
        raise UserError(
            f"{name} has layers that carry a state from token to token: exits need attention "
            "alone, whose K/V can be filled in later and taken back"
        )
    heads = [path for path, module in model.named_modules() if module is head]
    return Anatomy(trunk, layers, norms[-1], heads[0])


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
    it was recorded; boundaries: as `Segment` takes them, for attention in the exit.
    """

    hidden: Tensor
    position_ids: Tensor
    call: Call | None = None
    boundaries: Any = None


class Segment:
    """A run of layers `start`..`stop`-1 (counted from 0) that maps hidden states to hidden states.

    It is the backbone's own trunk with `layers` cut to a slice and the final norm left out. The
    first segment takes token ids, a later one the output of the segment before it.
    """

    def __init__(
        self, backbone: Backbone, layers: list[nn.Module], start: int, later: bool, record: bool
    ) -> None:
        """`layers` stand in for the backbone's from `start` on; `record` keeps the last's call."""
        self.start, self.stop = start, start + len(layers)
        self.is_first = not later
        self._backbone = backbone
        self._call: Call | None = None
        self._layers = [twin(layer, {}) for layer in layers]
        if record:
            self._layers[-1] = self._recorded(layers[-1])
        parts: dict[str, nn.Module] = {
            backbone.anatomy.layers: nn.ModuleList(self._layers),
            backbone.anatomy.norm: nn.Identity(),
        }
        family = backbone.family
        self.trunk = twin(backbone.trunk, parts | (family.later_parts if later else {}))
        self.trunk.config = slice_config(backbone.config, range(self.start, self.stop))
        for name, value in family.later_attributes.items() if later else ():
            setattr(self.trunk, name, value)
        self._trunks: dict[bool, nn.Module] = {}  # trunks for short and for long texts

    def windows(self) -> list[int | None]:
        """Per layer, how many tokens its sliding window sees; None for all.

        Raises:
            UserError: layers attend within chunks, or keep more than K/V.
        """
        config = self._backbone.config
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
        types = getattr(self._backbone.config, "layer_types", None)
        if not types or len(set(types)) == 1:
            return mask_of(0)
        own: list[str] = types[self.start : self.stop]
        return {kind: mask_of(own.index(kind)) for kind in dict.fromkeys(own)}

    def compile(self, cache: Cache | None = None) -> None:
        """Compile each layer, without its hooks; layers of a kind share one graph.

        cache: the one that every call will bring. A layer then sees only its own part of it: its
        number would be a constant of the graph.
        """
        for i, layer in enumerate(self._layers):
            layer.forward = torch.compile(layer.forward, dynamic=False)
            if cache is not None:
                layer.forward = _with_cache(layer.forward, cache.layers[i])

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
        if mask is None and cache is None and not self._backbone.family.masks_packing:
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
        return State(output.last_hidden_state, position_ids, call, boundaries)

    def _trunk_for(self, length: int | None) -> nn.Module:
        """The trunk with the rotary frequencies of texts of `length`; None: of what it is given.

        transformers chooses them anew in each pass, by the last position in it: those of one text
        would change, and a host that waits for the position cannot capture the pass.
        """
        if length is None:
            return self.trunk
        long = self._backbone.is_long(length)
        if long not in self._trunks:
            rotary = {
                path: _with_fixed_frequencies(module, length if long else 1)
                for path, module in self.trunk.named_modules()
                if _frequencies_change(module)
            }
            self._trunks[long] = twin(self.trunk, rotary) if rotary else self.trunk
        return self._trunks[long]

    def _packing_mask(self, inputs: Tensor, position_ids: Tensor) -> Any:
        """The masks of packed documents, for trunks that do not pass positions to theirs."""
        shape_only = torch.empty(
            *inputs.shape[:2], 1, device=inputs.device, dtype=self._backbone.dtype
        )
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


def _frequencies_change(module: nn.Module) -> bool:
    """Whether it is a rotary embedding with frequencies that depend on how long texts are."""
    kinds = getattr(module, "rope_type", ())
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def _with_fixed_frequencies(rotary: Any, length: int) -> nn.Module:
    """A copy of a rotary embedding that has the frequencies of texts of `length` for good."""
    fixed = copy.deepcopy(rotary)
    device = next(fixed.buffers()).device
    last = torch.tensor([[length - 1]], device=device)
    kinds = fixed.rope_type if isinstance(fixed.rope_type, dict) else {}
    for kind in kinds or [None]:
        fixed(torch.zeros(1, device=device), last, **({"layer_type": kind} if kind else {}))
    fixed.rope_type = dict.fromkeys(kinds, "default") if kinds else "default"
    return fixed


class _Kept(nn.Module):
    """An attention that keeps what it gave. (A hook would be lost in compiled code.)"""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.attention(*args, **kwargs)
        return self.output


def slice_config(config: Any, kept: Sequence[int]) -> Any:
    """`config` for a trunk that owns only the layers `kept`, counted from 0."""
    sliced = copy.copy(config)
    sliced.num_hidden_layers = len(kept)
    for name, value in vars(config).items():
        per_layer = isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
        if per_layer and not name.endswith(("token_id", "architectures")):
            setattr(sliced, name, [value[layer] for layer in kept])
    return sliced


def attention_name(layer: nn.Module) -> str:
    """The name of a layer's attention."""
    names = [n for n, m in layer.named_children() if "attention" in type(m).__name__.lower()]
    if not names:
        raise UserError(f"{type(layer).__name__} has no attention: mlp exits cannot be added to it")
    return names[0]


def mlp_names(layer: nn.Module) -> list[str]:
    """The names of what makes up a layer's MLP: its children with matrices, attention aside.

    Raises:
        UserError: the MLP is a mixture of experts.
    """
    attention = attention_name(layer)
    names = [
        name
        for name, child in layer.named_children()
        if name != attention and any(p.dim() >= 2 for p in child.parameters())
    ]
    if any(
        "expert" in path for name in names for path, _ in layer.get_submodule(name).named_modules()
    ):
        raise UserError(
            f"{type(layer).__name__} is a mixture of experts: mlp exits need a dense MLP; "
            "use norm, layer or embedding"
        )
    return names


def in_memory(module: nn.Module) -> bool:
    """Whether `module` is there, and not a placeholder of `ee_tuning.loading.load_backbone`."""
    return type(module) is not nn.Module


class _TrunkOutput(BaseModelOutputWithPast):
    """A trunk's output in which whatever a family adds (router logits, …) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Counter(nn.Module):
    """In place of a norm: counts its calls."""

    calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden


class _Passthrough(nn.Module):
    """In place of the trunk: hands `inputs_embeds` on to the head."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return _TrunkOutput(last_hidden_state=inputs_embeds)


class Backbone:
    """A frozen causal LM of transformers and its parts.

    Raises:
        UserError: see `find_anatomy`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.anatomy = find_anatomy(model)
        self.family = FAMILIES.get(model.config.model_type, Family())
        self.trunk = model.get_submodule(self.anatomy.trunk)
        self.layers = self.trunk.get_submodule(self.anatomy.layers)
        self.norm = self.trunk.get_submodule(self.anatomy.norm)
        self.head = model.get_submodule(self.anatomy.head)
        self._final_output = self.output(self.head)

    @property
    def num_layers(self) -> int:
        """Depth L of the backbone, whether or not every layer is in memory."""
        return self.config.num_hidden_layers

    @property
    def context(self) -> int | None:
        """The longest sequence the backbone was made for, in tokens, where its config says so."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def end(self) -> int | None:
        """How many tokens a text can have, where more are not only unwise but impossible.

        Learned positions end with the context. Rotary frequencies that grow with the length
        (dynamic) would no longer be those of the K/V that are kept.
        """
        grows = any(rope.get("rope_type") == "dynamic" for rope in self._ropes)
        return self.context if grows or self.family.positions_end else None

    @property
    def original_context(self) -> int | None:
        """The length of text beyond which rotary frequencies are others (longrope); else None.

        Those of one text may not change, so a text is short or long from its first token on.
        """
        lengths = [
            rope.get("original_max_position_embeddings")
            for rope in self._ropes
            if rope.get("rope_type") == "longrope"
        ]
        return min((length for length in lengths if length), default=None)

    def is_long(self, length: int) -> bool:
        """Whether a text of `length` tokens has the rotary frequencies of long ones."""
        return self.original_context is not None and length > self.original_context

    @property
    def _ropes(self) -> list[dict[str, Any]]:
        """The rotary parameters: one set, or one per type of layer."""
        ropes = getattr(self.config, "rope_parameters", None) or {}
        return [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]

    @property
    def longest_text(self) -> int | None:
        """The tokens to have room for where nobody says how many, nor that texts are long."""
        return self.original_context or self.end or self.context

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the backbone's weights."""
        return self.model.dtype

    def check_cuts(self) -> None:
        """Refuse a trunk that does more to hidden states than its layers and its norm do.

        A segment without layers has to give what it is given: else a later segment would not go on
        where the one before it ended.

        Raises:
            UserError: names the family.
        """
        problem = f"a model of type {self.config.model_type} cannot be cut into segments"
        if getattr(self.config, "alibi", False):
            raise UserError(f"{problem}: with ALiBi it wants to know where a text begins")
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 2, self.config.hidden_size, generator=draw)
        hidden = hidden.to(self.device, self.dtype)
        positions = torch.arange(2, device=self.device)[None]
        segment, norm = Segment(self, [], 1, later=True, record=False), _Counter()
        segment.trunk = twin(segment.trunk, {self.anatomy.norm: norm})
        try:
            with torch.inference_mode():
                after = segment(hidden, positions).hidden
        except Exception as error:
            raise UserError(f"{problem}: {first_line(error)}") from error
        if norm.calls != 1 or not torch.equal(after, hidden):
            raise UserError(f"{problem}: it changes hidden states outside of its layers")

    def segment(self, start: int, stop: int, record: bool = False) -> Segment:
        """The layers `start`..`stop`-1, counted from 0.

        Raises:
            UserError: one of them was left out of memory.
        """
        layers = list(self.layers)[start:stop]  # type: ignore[call-overload]
        for number, layer in enumerate(layers, start + 1):
            if not in_memory(layer):
                raise UserError(f"layer {number} is not in memory: load the whole backbone")
        return Segment(self, layers, start, later=start > 0, record=record)

    def block(self, layer: nn.Module) -> Segment:
        """A segment that is one layer, standing where the backbone's last layer stands."""
        return Segment(self, [layer], self.num_layers - 1, later=True, record=False)

    def output(self, head: nn.Module) -> nn.Module:
        """The model's own way from normalised hidden states to logits, through `head`.

        Call it with ``inputs_embeds=hidden``; scalings and soft-capping are the model's.
        """
        return twin(self.model, {self.anatomy.trunk: _Passthrough(), self.anatomy.head: head})

    def logits(self, features: Tensor) -> Tensor:
        """The final exit's head: normalised (B, T, H) → (B, T, V)."""
        return self._final_output(inputs_embeds=features).logits

    def final_logits(self, hidden: Tensor) -> Tensor:
        """The final exit: (B, T, H) after the last layer → (B, T, V)."""
        return self.logits(self.norm(hidden))
