"""Tokens drawn within a pass, for all of its rows by the same few operations.

What a row draws at a position depends on its seed and the position alone, so there is no state to
keep. Temperature, top-k, top-p and min-p are each row's own. `sampling` chooses what needs more:
any of transformers' processors, drafts, torch's own generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ee_tuning.decode.noise import STEP, mixed, spread

SEEDS = 2**53  # a table of fp64 has them exactly
ANY, TOP_K, TOP_P, MIN_P = 1, 2, 4, 8  # what a pass does to draw, as bits
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
        """What a pass does to draw a token, as bits: `ANY`, and what is left out before."""
        cuts = (self.top_k > 0, TOP_K), (self.top_p < 1, TOP_P), (self.min_p > 0, MIN_P)
        return ANY | sum(bit for wanted, bit in cuts if wanted)


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
    logits: Tensor, likeliest: Tensor, draws: Tensor, positions: Tensor, samples: int
) -> Tensor:
    """A token for each of logits (n, A, V) fp32: (n, A) int64.

    likeliest: (n, A), for rows that take it. draws: (n, 5), rows of `Draws`. positions: (n, A), of
    the tokens that these logits follow. samples: of all rows, see `Warp.samples`.
    """
    seed, temperature, top_k, top_p, min_p = draws[:, None, :].unbind(-1)  # (n, 1) each
    greedy = temperature == 0
    scores = logits / torch.where(greedy, 1, temperature).float()[..., None]
    weights = scores.softmax(-1)
    if samples > ANY:
        weights = _among_few(weights, top_k, top_p, min_p, samples)
    lots = mixed(seed.long() + positions * (STEP - 2**64))[..., None]  # as a signed integer
    numbers = torch.arange(logits.shape[-1], device=logits.device)
    # A race: exponentially distributed times, divided by weights, are least at each token as often
    # as its weight says. No sums along the vocabulary: those do not compile for few rows.
    times = -spread(lots + numbers).log() / weights
    return torch.where(greedy, likeliest, times.argmin(-1))


def _among_few(
    weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, samples: int
) -> Tensor:
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
