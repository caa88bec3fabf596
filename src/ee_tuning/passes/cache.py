"""Static K/V caches: every sequence has a slot, every position its place in the slot.

A place is written again before it is read again, so nothing is ever cleared: to take tokens back,
to pad a window or to hand a slot on to the next sequence is to write over it later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ee_tuning.backbone import Segment
from ee_tuning.devices import free_memory, readable, sent
from ee_tuning.errors import UserError
from ee_tuning.exits import DraftExit, Exit
from ee_tuning.passes.graphs import ALIGNED, compiled


@dataclass
class Place:
    """Where the tokens of the pass in progress belong.

    slots: (n,) int64, one per row of the batch; positions: (n, T) int64. reach: K/V up to this
    position are looked at. in_order: the slots are 0, 1, …, n − 1. empty: nothing is in the slots
    yet, so tokens attend to those of the same pass alone. start: the first position, where there
    is one row, that of slot 0, and the host may know it. texts: where those of all slots stand one
    after another in one row of the batch, how many tokens each has; what follows is padding.
    """

    slots: Tensor
    positions: Tensor
    reach: int
    in_order: bool
    empty: bool = False
    start: int | None = None
    texts: Sequence[int] | None = None
    _found: dict[Any, Any] = field(default_factory=dict)

    def remembered(self, key: tuple[Any, ...], find: Callable[..., Any]) -> Any:
        """What `find` makes of this place and `key`, the same for all layers."""
        if key not in self._found:
            self._found[key] = find(self, *key)
        return self._found[key]

    def in_ring(self, size: int) -> Tensor:
        """The places of the last positions in a slot of so many: (n, up to size)."""
        return self.positions[:, -size:] % size

    def know(self, places: Mapping[int, Tensor]) -> None:
        """Take `in_ring` of some sizes for computed."""
        self._found |= {(size,): found for size, found in places.items()}


class SlotLayer(CacheLayerMixin):
    """K/V of one layer: keys and values (slots, heads, size, head dim), a ring over positions.

    window: how many tokens a sliding window sees, None for all. `size` has room for the whole
    capacity, or for a window and what is written at a time.
    """

    is_compileable = False  # else transformers makes a mask of its own where none is needed

    def __init__(self, window: int | None, slots: int, capacity: int, longest: int) -> None:
        super().__init__()
        self.window, self.slots = window, slots
        self.is_sliding = window is not None
        self.size = capacity if window is None else min(capacity, window + longest)
        self.whole = False  # whether attention picks what its tokens see itself
        self.place: Place
        self.rows: Tensor
        self.places: Tensor | slice
        self.lasting: Tensor | slice  # which tokens of the pass are written
        self.keys: Tensor
        self.values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, given K and V (n, heads, T, head dim) of whatever tokens."""
        for name, x in (("keys", key_states), ("values", value_states)):
            shape = (self.slots, x.shape[1], self.size, x.shape[3])
            setattr(self, name, torch.zeros(shape, dtype=x.dtype, device=x.device))
        self.is_initialized = True

    def make_like(self, other: SlotLayer) -> None:
        """Make room for K and V of the heads that `other` has."""
        self.lazy_initialization(other.keys, other.values)

    def forget(self, slot: int) -> None:
        """Nothing is in a slot any more."""
        if self.is_initialized:
            self.keys[slot].zero_()
            self.values[slot].zero_()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Write K and V (n, heads, T, head dim); gives what their queries may look at.

        That is of all slots, if it is `whole`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self._write(self.keys, key_states), self._write(self.values, value_states)
        return (key_states, value_states) if self.place.empty else seen

    def put(self, place: Place) -> None:
        """The next pass is at `place`; of tokens that share a place, the last ones stay."""
        self.place, self.rows = place, place.slots[:, None]
        self.lasting, positions = slice(-self.size, None), place.positions
        if place.texts is not None:
            lengths = torch.tensor(place.texts, device=place.slots.device)
            length_of = lengths.repeat_interleave(lengths)
            from_end = length_of - place.positions[0, : len(length_of)]
            self.lasting = (from_end <= self.size).nonzero()[:, 0]
            self.rows = place.slots.repeat_interleave(lengths)[self.lasting][None]
            positions = place.positions[:, self.lasting]
        if place.start is not None and place.reach <= self.size:
            self.places = slice(place.start, place.reach)  # faster than one by one
        elif place.texts is not None:
            self.places = positions % self.size
        else:
            self.places = place.remembered((self.size,), Place.in_ring)

    @property
    def hides(self) -> bool:
        """Whether something is hidden from a query of the pass, so that it needs a mask."""
        place = self.place
        if self.whole:
            return True
        alone = place.start is not None and place.positions.shape[1] == 1
        return not alone or place.reach > (self.window or place.reach)

    def _write(self, kept: Tensor, new: Tensor) -> Tensor:
        place = self.place
        if isinstance(self.places, slice):
            kept[0, :, self.places] = new
        else:
            lasting = new[:, :, self.lasting].to(kept.dtype)  # another one only under autocast
            kept[self.rows, :, self.places] = lasting.transpose(1, 2)
        if self.whole:
            return kept[:, :, : -(-place.reach // ALIGNED) * ALIGNED]
        if place.in_order:
            return kept[: len(place.slots), :, : place.reach]
        return kept[:, :, : place.reach][place.slots]

    def seen(self, first: int, last: int) -> slice | Tensor:
        """The places of positions from `first` to `last` in a slot, in this order."""
        if self.window is None:
            return slice(first, last + 1)
        return torch.arange(first, last + 1, device=self.keys.device) % self.size

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What the queries of the pass see of `update`'s K/V: (n, 1, T, K), to be added.

        If it is `whole`, attention does not ask; a trunk that is given anything makes no mask.
        """
        if self.whole:
            return self.place.positions[:, None, :, None]
        queries = self.place.positions[..., None]
        places = torch.arange(min(self.size, self.place.reach), device=queries.device)
        age = (queries - places) % self.size
        hidden = age > queries
        if self.window is not None:
            hidden |= age >= self.window
        lowest = torch.finfo(dtype).min
        return torch.zeros(hidden.shape, dtype=dtype, device=age.device).masked_fill_(
            hidden, lowest
        )[:, None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """transformers makes a mask itself only where the slots are empty."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """As for `get_mask_sizes`."""
        return 0

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.size

    get_max_cache_shape = get_max_length  # its name before transformers 5.13


class SlotCache(Cache):
    """The `SlotLayer`s of a run of layers that starts at layer `first`, counted from 0.

    longest_text: tokens that a text may have.
    """

    def __init__(self, layers: list[SlotLayer], first: int, longest_text: int) -> None:
        super().__init__(layers=list(layers))
        self.slot_layers, self.first, self.longest_text = layers, first, longest_text

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Any:
        """As `SlotLayer.update`, of a layer counted from the model's start."""
        return self.slot_layers[layer_idx - self.first].update(key_states, value_states)

    def masks(self, segment: Segment, dtype: torch.dtype) -> Any:
        """What a segment is told that the tokens of the pass see, if something is hidden."""
        if not any(layer.hides for layer in self.slot_layers):
            return None
        return segment.masks(lambda j: self.slot_layers[j].mask(dtype))

    def forget(self, slot: int) -> None:
        """Nothing is in a slot any more."""
        for layer in self.slot_layers:
            layer.forget(slot)

    def put(self, place: Place) -> None:
        """The next pass is at `place`."""
        first: dict[int, SlotLayer] = {}
        for layer in self.slot_layers:
            alike = first.setdefault(layer.size, layer)
            if alike is layer:
                layer.put(place)
            else:
                layer.place, layer.rows, layer.places = place, alike.rows, alike.places
                layer.lasting = alike.lasting


@torch.inference_mode()
def make_caches(
    segments: Sequence[Segment],
    exits: Mapping[int, Exit],
    token: Tensor,
    sizes: tuple[int, int, int],
    longest_text: int,
) -> tuple[list[SlotCache], dict[int, SlotCache]]:
    """Caches of segments, and of the exits with K/V behind them, by layer.

    Large as the K/V of one token tell, which the model is asked for. token: it, (1, 1), or what a
    stage before gave for it, (1, 1, H). sizes: slots, places in each, tokens written at a time.
    longest_text: as for `SlotCache`.

    Raises:
        UserError: they do not fit into the memory that is free.
    """
    blocks = {k: exit.segment for k, exit in exits.items() if exit.segment is not None}
    first = torch.zeros(1, 1, dtype=torch.int64, device=token.device)
    place = Place(first[0], first, 1, in_order=True, empty=True)

    def cache(segment: Segment, slots: int, capacity: int, longest: int) -> SlotCache:
        layers = [SlotLayer(window, slots, capacity, longest) for window in segment.windows()]
        return SlotCache(layers, segment.start, longest_text)

    small = [cache(segment, 1, 1, 1) for segment in segments]
    small_exits = {k: cache(block, 1, 1, 1) for k, block in blocks.items()}
    for one in (*small, *small_exits.values()):
        one.put(place)
    for segment, own in zip(segments, small, strict=True):
        state = segment(token, first, own)
        token = state.hidden
        if segment.stop in blocks:
            exits[segment.stop].features(state, small_exits[segment.stop])
    for k, exit in exits.items():
        if isinstance(exit, DraftExit):
            states = token.repeat(1, 1, len(exit.sources))
            exit.first_step(first, states, first, small_exits[k])
    large = [cache(segment, *sizes) for segment in segments]
    large_exits = {k: cache(block, *sizes) for k, block in blocks.items()}
    both = zip([*small, *small_exits.values()], [*large, *large_exits.values()], strict=True)
    pairs = [pair for a, b in both for pair in zip(a.slot_layers, b.slot_layers, strict=True)]
    check_room(pairs, token.device)
    for sample, layer in pairs:
        layer.make_like(sample)
    return large, large_exits


def check_room(pairs: Sequence[tuple[Any, Any]], device: torch.device) -> None:
    """Refuse caches that would not fit, before any is made.

    pairs: for each layer one that holds a token, and the `SlotLayer` to be made like it.

    Raises:
        UserError: says how much they need and how much is free.
    """
    needed = sum(
        x.nbytes // x.shape[2] * large.slots * large.size
        for small, large in pairs
        for x in (small.keys, small.values)
    )
    free = free_memory(device)
    if free is not None and needed > free:
        slots, size = pairs[0][1].slots, max(large.size for _, large in pairs)
        raise UserError(
            f"K/V of {slots} sequences of {size} tokens need {readable(needed)}, "
            f"{device} has {readable(free)} free: decode fewer at a time, or shorter ones"
        )


class Rings:
    """The hidden states that wait before a segment until it computes them, by slot and position.

    rings: (slots, R, H) each; one before each segment, and behind the last one where a stage
    follows.
    """

    def __init__(self, number: int, slots: int, longest: int, like: Tensor, compile: bool) -> None:
        """longest: tokens of a window. like: (H,), a hidden state. compile: what is done in a
        pass."""
        size = (number, slots, 2 * longest, *like.shape)
        self.rings = like.new_zeros(size).unbind()
        self.begin, self._keep = compiled(_begin, compile), compiled(_keep, compile)

    def keep(
        self, i: int, slots: Tensor, positions: Tensor, hidden: Tensor, too: Tensor | None = None
    ) -> None:
        """Let hidden states (n, T, H) of slots (n,) at positions (n, T) wait in ring `i`, if there
        is one, and in `too`, of their shape."""
        if i < len(self.rings):
            self._keep(self.rings[i], slots, positions, hidden, too)

    def put(self, slots: Sequence[int], positions: Sequence[int], hidden: Tensor) -> None:
        """Let (n, H) of n tokens wait in the first one."""
        self.rings[0][places_in(self.rings[0], slots, positions)] = hidden

    def take(self, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """What waits in the last one of n tokens: (n, H)."""
        return self.rings[-1][places_in(self.rings[-1], slots, positions)]

    def forget(self, slot: int) -> None:
        """Nothing waits in a slot any more."""
        for ring in self.rings:
            ring[slot].zero_()


def places_in(
    ring: Tensor, slots: Sequence[int], positions: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Where in a ring (slots, R, …) n tokens are."""
    table = sent(torch.tensor([[*slots], [*positions]], dtype=torch.int64), ring.device)
    return table[0], table[1] % ring.shape[1]


def _begin(
    control: Tensor, ring: Tensor | None, limit: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The positions (n, T) of windows that `control` (n, 3 + T) tells of, see `Passes`, these up to
    `limit`, and what waits for them in the ring before a segment, (n, T, H), if there is one."""
    slots, starts = control[:, 0], control[:, 1:2]
    positions = starts + torch.arange(control.shape[1] - 3, device=control.device)
    there = None if ring is None else waiting(ring, slots, positions)
    return positions, positions.clamp(max=limit), there


def waiting(ring: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """What waits in a ring of slots (n,) at positions (n, T): (n, T, H)."""
    return ring[slots[:, None], positions % ring.shape[1]]


def _keep(
    ring: Tensor, slots: Tensor, positions: Tensor, hidden: Tensor, too: Tensor | None
) -> None:
    """Let hidden states (n, T, H) of slots (n,) wait in a ring, and elsewhere."""
    ring[slots[:, None], positions % ring.shape[1]] = hidden
    if too is not None:
        too.copy_(hidden)
