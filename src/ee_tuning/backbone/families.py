"""What the generic path cannot see about a model family: the only place that names any."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
