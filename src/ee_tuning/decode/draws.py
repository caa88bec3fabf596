"""Tokens drawn within a pass, for all of its rows by the same few operations.

What a row draws at a position depends on its seed and the position alone, see `noise`, so there is
no state to keep. Temperature, top-k, top-p and min-p are each row's own; for rows with any other of
transformers' processors `sampling` draws with the same noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ee_tuning.decode.noise import SEEDS, gumbel, places
from ee_tuning.losses import likeliest

FEW = 128  # tokens that are looked at where top-k leaves half as many or fewer
BITS = 30  # of a probability as an integer: up to 1.0, which is 0x3f800000
# What a pass does to draw its tokens.
NOTHING, ALL, AMONG_FEW = 0, 1, 2
TOP_K, TOP_P, MIN_P = 4, 8, 16  # of all tokens, and what is left out before: bits that add up
# transformers' names for the fields of a `Warp`, in its order.
WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}


@dataclass(frozen=True)
class Warp:
    """What is done to logits before a token is drawn, in this order, as transformers does it."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def samples(self) -> int:
        """What a pass does to draw a token."""
        cuts = (self.top_k > 0, TOP_K), (self.top_p < 1, TOP_P), (self.min_p > 0, MIN_P)
        first = AMONG_FEW if 0 < self.top_k <= FEW // 2 else ALL
        return first | sum(bit for wanted, bit in cuts if wanted)


def read_warp(processors: Iterable[Any]) -> tuple[Warp, bool]:
    """What transformers' `processors` do as far as a `Warp` can say it, and whether that is all."""
    found: dict[str, Any] = {}
    whole, names = True, list(WARPERS.values())
    for one in processors:
        name = WARPERS.get(type(one))
        usual = getattr(one, "filter_value", -torch.inf) == -torch.inf
        usual &= getattr(one, "min_tokens_to_keep", 1) == 1
        if name is None or not usual or name in found:
            whole = False
            continue
        whole &= not found or names.index(name) > names.index([*found][-1])
        found[name] = getattr(one, name)
    return Warp(**found), whole


def samples_of(kinds: Iterable[int]) -> int:
    """What one pass does for rows that each need one of these."""
    found = reduce(or_, kinds, NOTHING)
    # Few tokens are enough if they are for all rows.
    return found & ~AMONG_FEW if found & ALL else found


class Draws:
    """How the tokens of each slot are drawn, on the device.

    table: (slots, 5) fp64: seed, temperature (0: the likeliest is taken), top-k, top-p, min-p.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._host = torch.zeros(slots, 5, dtype=torch.float64)
        self.table = self._host.to(device, copy=True)
        self._told = True

    def set(self, slot: int, seed: int | None, warp: Warp | None) -> None:
        """What the next text in a slot draws with; without a seed the likeliest is taken."""
        row = [0.0] * 5
        if seed is not None and warp is not None:
            row = [seed, warp.temperature, warp.top_k or SEEDS, warp.top_p, warp.min_p]
        self._host[slot] = torch.tensor(row, dtype=torch.float64)
        self._told = False

    def tell(self) -> None:
        """Let the device know, before a pass."""
        if not self._told:
            self.table.copy_(self._host)
            self._told = True


def places_of(draws: Tensor, positions: Tensor) -> Tensor:
    """The places in noise (n, A) of tokens at positions (n, A), of rows (n, 5) of `Draws`."""
    return places(draws[:, :1].long(), positions)


def drawn(
    logits: Tensor,
    best: Tensor,
    draws: Tensor,
    place: Tensor,
    samples: int,
    tokens: Tensor | None = None,
) -> Tensor:
    """A token for each of logits (n, A, V) fp32, as its place among these: (n, A) int64.

    best: (n, A), the likeliest, for rows that take it. draws: (n, 5), rows of `Draws`. place:
    (n, A), see `places_of`. samples: not `NOTHING`. tokens: (V,), where the logits are of some
    tokens alone.
    """
    _, temperature, top_k, top_p, min_p = draws[:, None, :].unbind(-1)  # (n, 1) each
    greedy = temperature == 0
    scores = logits / torch.where(greedy, 1, temperature).float()[..., None]
    picked = None
    if samples & AMONG_FEW and scores.shape[-1] > FEW:
        scores, picked = scores.topk(FEW, dim=-1)
    if samples > AMONG_FEW:
        weights = _left_in(scores.softmax(-1), top_k, top_p, min_p, samples)
        scores = weights.log()
    if picked is None:
        ids = torch.arange(logits.shape[-1], device=logits.device) if tokens is None else tokens
    else:
        ids = picked if tokens is None else tokens[picked]
    chosen = likeliest(scores + gumbel(place, ids))
    if picked is not None:
        chosen = picked.gather(-1, chosen[..., None])[..., 0]
    return torch.where(greedy, best, chosen)


def _left_in(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, samples: int) -> Tensor:
    """Probabilities (n, A, V), 0 for those left out; top_k, top_p, min_p: (n, 1) fp64.

    What no row asks for, by `samples`, is not computed: top-k and top-p look at all of them 30
    times.
    """
    bits = weights.view(torch.int32)  # in the same order, none is negative
    if samples & TOP_K:
        weights = weights.where(bits >= _least(bits, None, top_k), 0)
    if samples & TOP_P:
        share = top_p * weights.sum(-1, dtype=torch.float64)
        least = torch.where(top_p[..., None] < 1, _least(bits, weights, share), 0)
        weights = weights.where(bits >= least, 0)
    if samples & MIN_P:
        least = min_p[..., None].float() * weights.amax(-1, keepdim=True)
        weights = weights.where(weights >= least, 0)
    return weights


def _least(bits: Tensor, weights: Tensor | None, wanted: Tensor) -> Tensor:
    """The largest number of which `bits` (n, A, V) has as much above or at it as is `wanted`,
    (n, A), counted or weighed: (n, A, 1) int32. Found bit by bit: no sorting."""
    least = torch.zeros_like(bits[..., :1])
    for bit in reversed(range(BITS)):
        higher = least + (1 << bit)
        within = bits >= higher
        if weights is None:
            have = within.sum(-1, keepdim=True)
        else:
            have = weights.where(within, 0).sum(-1, keepdim=True)
        least = torch.where(have >= wanted[..., None], higher, least)
    return least
