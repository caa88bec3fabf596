"""What the device knows of a text that is alone: its state, and its newest token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ee_tuning.passes.cache import Place
from ee_tuning.passes.graphs import compiled
from ee_tuning.passes.passes import Passes

TOKENS = 4  # that the device may be ahead: those behind a text's end are lost, and new texts wait
# The state, in fp64: a text's slot, newest token, tokens, how many of them are pending and may be,
# tokens found, up to `TOKENS`, then again from 0, and which pieces run next; of each of these
# tokens: it, the segment behind which it left, confidence; then, by segment, tokens that it has
# computed, and thresholds.
SLOT, NEWEST, LENGTH, PENDING, LIMIT, NUMBER, GOES_ON, SAID = range(8)
DONE = SAID + 3 * TOKENS
# What may run next: nothing, a step with the newest token alone, or with more.
ONE, MORE = 1, 2
# From one number that is told of the newest token to the next: the compiler copies what it is given
# first, if that does not lie at a multiple of 16 bytes.
APART = 2


def at_once(count: int, behind: bool) -> int:
    """Tokens of one look where the device may be `count` ahead. behind: at half of them while the
    host looks at the others."""
    return max(1, count // 2) if behind else count


class Newest:
    """The newest token, as passes of it alone are told of it.

    What steps share lies in memory of its own: a tensor of a captured step has no numbers when the
    next one is captured. slots: (1,), id: (1, 1), int64. hidden: (1, 1, H), what the step before
    gave. sizes: of slots.
    """

    def __init__(self, passes: Passes) -> None:
        caches = [*passes.caches, *passes.exit_caches.values()]
        self.sizes = sorted({layer.size for cache in caches for layer in cache.slot_layers})
        size = 4 + len(self.sizes), APART
        self._told = torch.zeros(size, dtype=torch.int64, device=passes.device)
        slots, self.id, self._position, self._limited, *places = (
            one[:1, None] for one in self._told
        )
        self.slots, self._limit = slots[0], passes.limit
        self._places = dict(zip(self.sizes, places, strict=True))
        self.hidden = passes.rings.rings[0].new_zeros(1, 1, passes.backbone.config.hidden_size)
        self._tables = passes.keep_positions(self._limited)
        self._enter = compiled(_enter, passes.compile)

    def read(self, state: Tensor) -> None:
        """Find what it is in the state."""
        self._enter(state, self._told, self.sizes, self._limit, self._tables)

    def place(self, reach: int, in_order: bool) -> Place:
        """Its place."""
        place = Place(self.slots, self._position, reach, in_order)
        place.know(self._places)
        return place

    def position_ids(self) -> Tensor:
        """Its position (1, 1): a new tensor each time, since what is made of positions is kept for
        one tensor; but where that is in tables which `read` fills."""
        return self._limited if self._tables else self._limited.view(1, 1)


def _enter(
    state: Tensor, told: Tensor, sizes: Sequence[int], limit: int,
    tables: Sequence[tuple[Tensor, Tensor]],
) -> None:  # fmt: skip
    """Tell of the newest token its slot, what it is, at which position, that up to `limit`, and at
    which place of slots with so many; and what tables of all positions have of it."""
    at = state[LENGTH].long() - 1
    within = at.clamp(max=limit)
    first = [state[SLOT].long(), state[NEWEST].long(), at, within]
    told[:, 0] = torch.stack([*first, *(at % size for size in sizes)])
    for table, own in tables:
        own.copy_(table[within.view(1, 1)])
