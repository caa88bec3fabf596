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
    return _mixed(seeds + positions * _signed(STEP))


def gumbel(place: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise of `tokens`, int64 (..., V), at `places` (...): (..., V) fp32."""
    x = _shifted(_mixed(place[..., None] + tokens), 64 - BITS)
    # Small numbers make large noise: these are apart by as little as fp32 has there. None is 1.
    lots = (x.float() + 0.5) / 2**BITS
    return -(-torch.log1p(-lots.clamp(max=1 - 2**-24))).log()


def _mixed(x: Tensor) -> Tensor:
    """A state of splitmix64, int64, as its number."""
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    return x ^ _shifted(x, 31)


def _signed(x: int) -> int:
    """The same 64 bits as torch has them: products go over the edge alike."""
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> by) & (2 ** (64 - by) - 1)
