"""A reduced vocabulary for the exits: the most frequent tokens of the data they are tuned on.

With 128,256 tokens the heads take most of the time of tuning and of decoding. Exits that know only
some tokens predict among these; a token they do not know is left to the final exit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ee_tuning.errors import UserError
from ee_tuning.losses import IGNORED


class Vocabulary:
    """The token ids (N,) int64, ascending, that the exits of a model know, of `size` in all."""

    def __init__(self, tokens: Tensor, size: int) -> None:
        self.tokens, self.size = tokens.cpu(), size
        self.places = torch.full((size,), IGNORED)
        self.places[self.tokens] = torch.arange(len(tokens))

    def to_places(self, labels: Tensor) -> Tensor:
        """Labels (B, T) on the CPU as places in `tokens`; `IGNORED` for what is not there."""
        return torch.where(labels == IGNORED, IGNORED, self.places[labels.clamp(min=0)])

    def known(self, labels: Tensor) -> Tensor:
        """Labels (B, T) on the CPU with `IGNORED` in place of those that are not in `tokens`."""
        return torch.where(self.to_places(labels) == IGNORED, IGNORED, labels)


def check_number(number: int, size: int) -> None:
    """Refuse to let exits know `number` tokens of a vocabulary of `size`.

    Raises:
        UserError: `number` is not between 1 and `size`.
    """
    if not 1 <= number <= size:
        raise UserError(f"exit_vocab is {number}: it must be between 1 and {size}, the vocabulary")


def most_frequent(batches: Iterable[dict[str, Tensor]], number: int, size: int) -> Tensor:
    """The `number` tokens that occur most often among the labels of `batches`, ascending.

    Ties, and tokens that never occur, by their id.

    Raises:
        UserError: see `check_number`.
    """
    check_number(number, size)
    counts = torch.zeros(size, dtype=torch.int64)
    for batch in batches:
        counts += torch.bincount(batch["labels"][batch["labels"] != IGNORED], minlength=size)
    order = counts.sort(descending=True, stable=True).indices
    return order[:number].sort().values
