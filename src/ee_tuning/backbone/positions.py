"""How long texts may be, and the rotary frequencies that depend on it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ee_tuning.backbone.families import Family
from ee_tuning.errors import UserError
from ee_tuning.twin import twin


def padded_positions(mask: Tensor, shape: torch.Size) -> Tensor:
    """Positions (B, T) of texts that are padded where `mask` is 0.

    Padding is a text of its own, as in rows of packed documents: neither sees the other.

    Raises:
        UserError: the mask is not of this shape, or of texts with holes.
    """
    if mask.shape != shape:
        raise UserError(
            f"attention_mask has shape {tuple(mask.shape)}, the texts have {tuple(shape)}"
        )
    real = mask != 0
    begins = F.pad(real[:, 1:] != real[:, :-1], (1, 0), value=True)
    if ((begins & real).sum(-1) > 1).any():
        raise UserError("attention_mask has 0 within a text: pad a text at its ends")
    index = torch.arange(mask.shape[1], device=mask.device)
    return index - torch.where(begins, index, 0).cummax(-1).values


class Positions:
    """What a backbone's config says about the lengths of texts."""

    config: Any
    family: Family

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
        lengths: list[int] = [
            rope["original_max_position_embeddings"]
            for rope in self._ropes
            if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings")
        ]
        return min(lengths) if lengths else None  # min(…, default=…) is beyond the compiler

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


def frequencies_change(module: nn.Module) -> bool:
    """Whether it is a rotary embedding with frequencies that depend on how long texts are."""
    kinds = getattr(module, "rope_type", ())
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def is_rotary(module: nn.Module) -> bool:
    """Whether it is a rotary embedding whose frequencies are the same for all texts."""
    has = any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    return has and not frequencies_change(module)


class RotaryTable(nn.Module):
    """In place of a rotary embedding: what that gives for each position, computed once."""

    def __init__(self, rotary: nn.Module, number: int, like: Tensor) -> None:
        """number: of positions. like: of the dtype and on the device that is asked with."""
        super().__init__()
        positions = torch.arange(number, device=like.device)[None]
        self._table = [one[0] for one in rotary(like, positions)]
        self.kept: tuple[Tensor, tuple[Tensor, ...]] | None = None  # positions, what it has of them

    def keep(self, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """See `Segment.keep_positions`."""
        own = tuple(one.new_zeros(*position_ids.shape, *one.shape[1:]) for one in self._table)
        self.kept = position_ids, own
        return [*zip(self._table, own, strict=True)]

    @staticmethod
    def serves(rotary: nn.Module) -> bool:
        """Whether it depends on positions alone, as (1, T) → (1, T, D) each."""
        return is_rotary(rotary) and len(inspect.signature(rotary.forward).parameters) == 2

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines (B, T, D) of positions (B, T)."""
        return tuple(one[position_ids] for one in self._table)


def with_frequencies(trunk: nn.Module, length: int) -> nn.Module:
    """A twin of `trunk` that has the rotary frequencies of texts of `length` tokens.

    transformers chooses them anew in each pass, by the last position in it: those of one text
    would change, and a host that waits for the position cannot capture the pass.
    """
    rotary = {
        path: _with_fixed_frequencies(module, length)
        for path, module in trunk.named_modules()
        if frequencies_change(module)
    }
    return twin(trunk, rotary) if rotary else trunk


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
