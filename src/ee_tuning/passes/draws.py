"""Tokens drawn within a pass, for all of its rows by the same few operations.

What a row draws at a position depends on its seed and the position alone, see `noise`, so there is
no state to keep. Temperature, top-k, top-p and min-p are each row's own; for rows with any other of
transformers' processors `sampling` draws with the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ee_tuning.losses import likeliest
from ee_tuning.passes.graphs import compiled
from ee_tuning.passes.noise import SEEDS, gumbel, places

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


def bisects(samples: int) -> bool:
    """Whether a probability is found bit by bit, which in one piece takes a compiler long."""
    return bool(samples & (TOP_K | TOP_P))


class Draws:
    """How the tokens of each slot are drawn, on the device.

    table: (slots, 5) fp64: seed, temperature (0: the likeliest is taken), top-k, top-p, min-p.
    """

    def __init__(self, slots: int, device: torch.device, compile: bool = False) -> None:
        """compile: what `draw` does."""
        self._draw = compiled(draw, compile, each=False)
        self._parts = Parts(*(compiled(part, compile, each=False) for part in PARTS))
        self._host = torch.zeros(slots, 5, dtype=torch.float64)
        self.table = self._host.to(device, copy=True)
        self._told = True

    def set(self, slot: int, seed: int | None, warp: Warp | None) -> None:
        """What the next text in a slot draws with; without a seed the likeliest is taken."""
        row = [0.0] * 5
        if seed is not None and warp is not None:
            row = [seed, warp.temperature, warp.top_k or SEEDS, warp.top_p, warp.min_p]
        self._host.numpy()[slot] = row
        self._told = False

    def tell(self) -> None:
        """Let the device know, before a pass, behind what it is at."""
        if not self._told:
            self.table.copy_(self._host, non_blocking=True)
            self._told = True

    def draw(
        self, known: Tensor, answers: Tensor, slots: Tensor, positions: Tensor, samples: int,
        tokens: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """`answers` (2, n, A) to logits `known` (n, A, N), see `wanted.predict`, with tokens that
        are drawn in place of the likeliest, for those slots (n,) whose texts are sampled.

        positions: (n, A). samples, tokens: see `drawn`.
        """
        given = known, answers, self.table, slots, positions, samples, tokens
        if bisects(samples):
            return draw(*given, self._parts)
        return self._draw(*given)


def places_of(draws: Tensor, positions: Tensor) -> Tensor:
    """The places in noise (n, A) of tokens at positions (n, A), of rows (n, 5) of `Draws`."""
    return places(draws[:, :1].long(), positions)


def draw(
    known: Tensor, answers: Tensor, table: Tensor, slots: Tensor, positions: Tensor, samples: int,
    tokens: Tensor | None, parts: Parts | None = None,
) -> Tensor:  # fmt: skip
    """See `Draws.draw` and `drawn`."""
    own = table[slots]
    found = drawn(known, likeliest(known), own, places_of(own, positions), samples, tokens, parts)
    found = found if tokens is None else tokens[found]
    return torch.stack([found.float(), answers[1]])


class Parts(NamedTuple):
    """What `drawn` does in turn; compiled one by one where it does the second for each bit."""

    scores: Callable[..., Any]
    raised: Callable[..., Any]
    pick: Callable[..., Any]


def drawn(
    logits: Tensor,
    best: Tensor,
    draws: Tensor,
    place: Tensor,
    samples: int,
    tokens: Tensor | None = None,
    parts: Parts | None = None,
) -> Tensor:
    """A token for each of logits (n, A, V) fp32, as its place among these: (n, A) int64.

    best: (n, A), the likeliest, for rows that take it. draws: (n, 5), rows of `Draws`. place:
    (n, A), see `places_of`. samples: not `NOTHING`. tokens: (V,), where the logits are of some
    tokens alone. parts: in place of `PARTS`.
    """
    parts = parts or PARTS
    scores, picked = parts.scores(logits, draws, samples)
    if bisects(samples):
        scores = _left_in(scores, draws, samples, parts.raised)
    return parts.pick(scores, picked, best, draws, place, samples, tokens)


def _scores(logits: Tensor, draws: Tensor, samples: int) -> tuple[Tensor, Tensor | None]:
    """Scores at each row's temperature, and of which tokens they are, if of few: (n, A, FEW). In
    place of scores probabilities, where some of these are to be left out."""
    temperature = draws[:, None, 1]
    scores = logits / torch.where(temperature == 0, 1, temperature).float()[..., None]
    picked = None
    if samples & AMONG_FEW and scores.shape[-1] > FEW:
        scores, picked = scores.topk(FEW, dim=-1)
    return scores.softmax(-1) if samples > AMONG_FEW else scores, picked


def _pick(
    scores: Tensor, picked: Tensor | None, best: Tensor, draws: Tensor, place: Tensor, samples: int,
    tokens: Tensor | None,
) -> Tensor:  # fmt: skip
    """What `drawn` gives, by what is left of `_scores`."""
    if samples & MIN_P:
        least = draws[:, None, 4, None].float() * scores.amax(-1, keepdim=True)
        scores = scores.where(scores >= least, 0)
    if samples > AMONG_FEW:
        scores = scores.log()
    if picked is None:
        ids = torch.arange(scores.shape[-1], device=scores.device) if tokens is None else tokens
    else:
        ids = picked if tokens is None else tokens[picked]
    chosen = likeliest(scores + gumbel(place, ids))
    if picked is not None:
        chosen = picked.gather(-1, chosen[..., None])[..., 0]
    return torch.where(draws[:, None, 1] == 0, best, chosen)


def _left_in(weights: Tensor, draws: Tensor, samples: int, raised: Callable[..., Any]) -> Tensor:
    """Probabilities (n, A, V), 0 for those left out by top-k and top-p.

    What no row asks for, by `samples`, is not computed: each looks at all of them 30 times.
    """
    _, _, top_k, top_p, _ = draws[:, None, :].unbind(-1)  # (n, 1) each
    bits = weights.view(torch.int32)  # in the same order, none is negative
    if samples & TOP_K:
        weights = weights.where(bits >= _least(bits, None, top_k, raised), 0)
    if samples & TOP_P:
        share = top_p * weights.sum(-1, dtype=torch.float64)
        least = torch.where(top_p[..., None] < 1, _least(bits, weights, share, raised), 0)
        weights = weights.where(bits >= least, 0)
    return weights


def _least(
    bits: Tensor, weights: Tensor | None, wanted: Tensor, raised: Callable[..., Any]
) -> Tensor:
    """The largest number of which `bits` (n, A, V) has as much above or at it as is `wanted`,
    (n, A), counted or weighed: (n, A, 1) int32. Found bit by bit: no sorting."""
    least = bits.new_zeros((*bits.shape[:-1], 1))
    ones = 1 << torch.arange(BITS, dtype=torch.int32, device=bits.device)
    for bit in reversed(ones.unbind()):
        least = raised(bits, weights, least, bit, wanted)
    return least


def _raised(
    bits: Tensor, weights: Tensor | None, least: Tensor, bit: Tensor, wanted: Tensor
) -> Tensor:
    """`least` with one more `bit`, if there is still as much above or at that."""
    higher = least + bit
    within = bits >= higher
    if weights is None:
        have = within.sum(-1, keepdim=True)
    else:
        have = weights.where(within, 0).sum(-1, keepdim=True)
    return torch.where(have >= wanted[..., None], higher, least)


PARTS = Parts(_scores, _raised, _pick)
