"""What samples are drawn with: Gumbel noise that follows from a seed, a place and a token alone.

The token with the largest score + noise is a sample of the scores' softmax (the Gumbel-max trick;
Maddison, Tarlow, Minka: A* sampling, arXiv 1411.0030, section 2). Nothing else is random: whoever
asks what follows a place of a text, an exit or the final one, alone or beside other texts, in
whatever order, draws with the same noise. So an exit draws what the final exit will draw as often
as their distributions let it, and whether a draft is right is a question of equal tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEEDS = 2**53  # a table of fp64 has them exactly
# Of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014): the
# step from one state to the next, and what makes a number of a state.
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# The same for the tokens of a place, in 32 bits, which cost a quarter of 64: an odd step, and the
# factors of a hash without visible bias (C. Wellons, Prospecting for hash functions, 2018).
TOKEN_STEP, TOKEN_FIRST, TOKEN_SECOND = 0x9E3779B9, 0x21F0AAAD, 0x735A2D97
BITS = 31  # of a number


class Seeds:
    """Seeds for the samples of a stream's rows, in the order in which the rows come.

    All follow from one number of torch's own generator, which the first one takes.
    """

    def __init__(self) -> None:
        self._seeds: torch.Generator | None = None

    def next(self) -> int:
        """Of one more row."""
        if self._seeds is None:
            self._seeds = torch.Generator()
            self._seeds.manual_seed(int(torch.randint(SEEDS, ())))
        return int(torch.randint(SEEDS, (), generator=self._seeds))


def places(seeds: Tensor, positions: Tensor) -> Tensor:
    """What stands for places, int64 (...): of a text's seed, and of the token that is followed."""
    return _mixed(seeds + positions * _signed(STEP, 64))


def gumbel(place: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise of `tokens`, int64 (..., V), at `places` (...): (..., V) fp32."""
    state = place[..., None]
    # Halves without their signs: what an int32 holds on every device.
    low, high = (state & (2**31 - 1)).int(), (_shifted(state, 32) & (2**31 - 1)).int()
    x = tokens.int() * _signed(TOKEN_STEP, 32) + low
    x = (x ^ _shifted(x, 16)) * _signed(TOKEN_FIRST, 32) ^ high
    x = (x ^ _shifted(x, 15)) * _signed(TOKEN_SECOND, 32)
    x = x ^ _shifted(x, 15)
    # Small numbers make large noise: these are apart by as little as fp32 has there. None is 1.
    lots = ((x & (2**BITS - 1)).float() + 0.5) / 2**BITS
    return -(-torch.log1p(-lots.clamp(max=1 - 2**-24))).log()


def _mixed(x: Tensor) -> Tensor:
    """A state of splitmix64, int64, as its number."""
    x = (x ^ _shifted(x, 30)) * _signed(FIRST, 64)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND, 64)
    return x ^ _shifted(x, 31)


def _signed(x: int, bits: int) -> int:
    """The same bits as torch has them: products go over the edge alike."""
    return x - 2**bits if x >= 2 ** (bits - 1) else x


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> by) & (2 ** (torch.iinfo(x.dtype).bits - by) - 1)
