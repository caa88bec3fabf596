"""Tokens drawn within a pass, for all of its rows by the same few operations.

What a row draws at a position depends on its seed and the position alone, so there is no state to
keep. Temperature, top-k, top-p and min-p are each row's own. `sampling` chooses what needs more:
any of transformers' processors, drafts, torch's own generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ee_tuning.decode.noise import STEP, spread

SEEDS = 2**53  # a table of fp64 has them exactly
BITS = 30  # of a probability as an integer: up to 1.0, which is 0x3f800000


@dataclass(frozen=True)
class Warp:
    """What is done to logits before a token is drawn, in this order, as transformers does it."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def samples(self) -> int:
        """What a pass does to draw a token: 1 from all of them, 2 among some."""
        return 2 if self.top_k > 0 or self.top_p < 1 or self.min_p > 0 else 1


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


def drawn(
    logits: Tensor, likeliest: Tensor, draws: Tensor, positions: Tensor, cuts: bool
) -> Tensor:
    """A token for each of logits (n, A, V) fp32: (n, A) int64.

    likeliest: (n, A), for rows that take it. draws: (n, 5), rows of `Draws`. positions: (n, A), of
    the tokens that these logits follow. cuts: whether any row leaves tokens out.
    """
    seed, temperature, top_k, top_p, min_p = draws[:, None, :].unbind(-1)  # (n, 1) each
    greedy = temperature == 0
    scores = logits / torch.where(greedy, 1, temperature).float()[..., None]
    weights = scores.softmax(-1)
    if cuts:
        weights = _among_few(weights, top_k, top_p, min_p)
    sums = weights.cumsum(-1)
    lots = spread(seed.long() + positions * (STEP - 2**64))  # as a signed integer
    limit = lots[..., None] * sums[..., -1:]
    size = logits.shape[-1]
    numbers = torch.arange(size, device=logits.device, dtype=torch.int32)
    # The weight itself is looked at, too: sums that are added up in parts may rise by rounding.
    chosen = torch.where((sums >= limit) & (weights > 0), numbers, size).amin(-1)
    return torch.where(greedy, likeliest, chosen.clamp(max=size - 1).long())


def _among_few(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities (n, A, V), 0 for those left out; top_k, top_p, min_p: (n, 1) fp64."""
    bits = weights.view(torch.int32)  # in the same order, none is negative
    weights = weights.where(bits >= _least(bits, None, top_k), 0)
    share = top_p * weights.sum(-1, dtype=torch.float64)
    least = torch.where(top_p[..., None] < 1, _least(bits, weights, share), 0)
    weights = weights.where(bits >= least, 0)
    return weights.where(weights >= min_p[..., None].float() * weights.amax(-1, keepdim=True), 0)


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
