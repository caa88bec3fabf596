"""What a pass of decoding is given, and what it is to give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass
class Window:
    """Tokens of one sequence that a segment computes at once: its next `count` ones.

    ids: the tokens, where the segment is the first.
    """

    slot: int
    count: int
    ids: Sequence[int] = ()


IDLE = Window(0, 0)


@dataclass(frozen=True)
class Wanted:
    """What a pass is to predict.

    after: ``nothing``, ``last`` (what follows the last token of each window) or ``each``.
    final: by the final exit, not by the one that may sit at the same layer. measure: of
    confidence, see `ee_tuning.losses.confidence`. samples: in place of the likeliest tokens some
    are drawn, as `Passes.draws` and the numbers in `draws` say.
    """

    after: str
    final: bool
    measure: str = "probability"
    samples: int = 0


class Rows(NamedTuple):
    """What a prediction is for: how many tokens each window has, (n,), and what they are drawn by:
    rows (n, 5) of `Draws`, and the places (n, A) in noise of the tokens that are followed."""

    counts: Tensor
    draws: Tensor
    places: Tensor
