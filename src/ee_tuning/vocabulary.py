"""A reduced vocabulary for the exits: the most frequent tokens of the data they are tuned on.

With 128,256 tokens the heads take most of the time of tuning and of decoding. Exits that know only
some tokens predict among these; a token they do not know is left to the final exit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ee_tuning.errors import UserError
from ee_tuning.losses import IGNORED

COVERAGE = 0.99  # of the data's tokens that exits know, where nobody says how many they know
LEAST = 8192  # tokens of a vocabulary that is worth reducing


class Vocabulary:
    """The token ids (N,) int64, ascending, that the exits of a model know, of `size` in all.

    coverage: the share of held-out targets that are among them, where it was measured. names: a
    hash of what their tokenizer calls them, where it is known.
    """

    coverage: float | None = None
    names: str | None = None

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


def names_of(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what `tokenizer` calls `tokens` (N,)."""
    names = tokenizer.convert_ids_to_tokens(tokens.tolist())
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16]


def check_names(
    vocabulary: Vocabulary | None, tokenizer: PreTrainedTokenizerBase, exits: str
) -> None:
    """Refuse to read with `tokenizer` for exits whose tokens are another one's.

    Raises:
        UserError: it calls the tokens that they know otherwise.
    """
    if vocabulary is None or vocabulary.names is None:
        return
    if names_of(vocabulary.tokens, tokenizer) != vocabulary.names:
        raise UserError(
            f"{exits} knows {len(vocabulary.tokens):,} tokens of another tokenizer than "
            f"{tokenizer.name_or_path}: give the one that it was tuned with"
        )


def check_number(number: int, size: int) -> None:
    """Refuse to let exits know `number` tokens of a vocabulary of `size`.

    Raises:
        UserError: `number` is not between 1 and `size`.
    """
    if not 1 <= number <= size:
        raise UserError(f"exit_vocab is {number}: it must be between 1 and {size}, the vocabulary")


def count_tokens(batches: Iterable[dict[str, Tensor]], size: int) -> Tensor:
    """How often each token of a vocabulary of `size` is a label of `batches`: (size,) int64."""
    counts = torch.zeros(size, dtype=torch.int64)
    for batch in batches:
        counts += torch.bincount(batch["labels"][batch["labels"] != IGNORED], minlength=size)
    return counts


def most_frequent(counts: Tensor, number: int) -> Tensor:
    """The `number` tokens that occur most often, ascending; counts: (V,), see `count_tokens`.

    Ties, and tokens that never occur, by their id.

    Raises:
        UserError: see `check_number`.
    """
    check_number(number, len(counts))
    order = counts.sort(descending=True, stable=True).indices
    return order[:number].sort().values


def enough(counts: Tensor) -> int:
    """The smallest multiple of 64 of tokens that are `COVERAGE` of all; 0, for all tokens, where
    that is more than half of them or the vocabulary is small."""
    size = len(counts)
    covered = counts.sort(descending=True).values.cumsum(0)
    number = int((covered < COVERAGE * covered[-1]).sum()) + 1
    number += -number % 64
    return number if size >= LEAST and number <= size // 2 else 0
