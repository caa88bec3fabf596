"""Which sequences make up which optimizer step, and how they become tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from ee_tuning.data.rows import Rows


class SampleOrder:
    """The endless stream of sequences, addressed by optimizer step.

    The first epoch is shuffled within windows of ``rows.window`` sequences, so that a run starts
    when the first window is ready; each later one is a permutation of its own. A step may span
    epochs. A pure function of the arguments: there is no state to save, and every process computes
    the same order.
    """

    def __init__(
        self, rows: Rows | range, global_batch_size: int, seed: int, steps: int = 0
    ) -> None:
        """rows: or their numbers. steps: for which rows are prepared ahead."""
        self.rows, self.global_batch_size, self.seed = rows, global_batch_size, seed
        self.window = rows.window if isinstance(rows, Rows) else len(rows)
        if self._count(1) < 1 or global_batch_size < 1:
            raise ValueError(f"{self._count(1)=} and {global_batch_size=} must be at least 1")
        self.samples = steps * global_batch_size
        self._permutation = lru_cache(maxsize=2)(_permutation)  # drawing one again is O(n)

    def indices(self, step: int) -> list[int]:
        """The `global_batch_size` sequences of optimizer step `step`, counted from 0.

        Raises:
            UserError: see `Blocks.prepare`.
        """
        first = step * self.global_batch_size
        found = [self._sample(i) for i in range(first, first + self.global_batch_size)]
        after = (first // self.window + 1) * self.window  # the window that comes next
        if isinstance(self.rows, Rows) and after < self.samples:
            self.rows.ahead(min(after + self.window, self.samples))
        return found

    def _count(self, most: int) -> int:
        return self.rows.count(most) if isinstance(self.rows, Rows) else min(most, len(self.rows))

    def _sample(self, i: int) -> int:
        known = self._count(i + 1)
        if known <= i:  # there are no more
            epoch, position = divmod(i, known)
            return int(self._permutation(known, self.seed, epoch)[position])
        window, position = divmod(i, self.window)
        start = window * self.window
        size = self._count(start + self.window) - start
        return start + int(self._permutation(size, self.seed, 0, window)[position])


def _permutation(size: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


def collate(packed: Rows, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    """The rows `indices` of a packed data set as one batch.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, each (B, T) int64.
    """
    return packed[list(indices)]


def micro_batches(
    packed: Rows, indices: Sequence[int], size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The rows `indices` in batches of `size`, the last one perhaps shorter; see `collate`."""
    for start in range(0, len(indices), size):
        yield collate(packed, indices[start : start + size])
