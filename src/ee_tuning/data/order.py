"""Which sequences make up which optimizer step, and how they become tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import torch


class SampleOrder:
    """The endless stream of sequences, addressed by optimizer step.

    Sample ``i`` of the stream belongs to epoch ``i // num_sequences``. Each epoch is a permutation
    of its own, and a step may span epochs. A pure function of the arguments: there is no state to
    save, and every process computes the same order.
    """

    def __init__(self, num_sequences: int, global_batch_size: int, seed: int) -> None:
        if num_sequences < 1 or global_batch_size < 1:
            raise ValueError(f"{num_sequences=} and {global_batch_size=} must be at least 1")
        self.num_sequences = num_sequences
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> list[int]:
        """The `global_batch_size` sequences of optimizer step `step`, counted from 0."""
        first = step * self.global_batch_size
        return [self._sample(i) for i in range(first, first + self.global_batch_size)]

    def _sample(self, i: int) -> int:
        epoch, position = divmod(i, self.num_sequences)
        if epoch != self._epoch:  # kept, since drawing it again for each sample is O(n)
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(
                self.num_sequences
            )
            self._epoch = epoch
        return int(self._permutation[position])


def collate(packed: datasets.Dataset, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    """The rows `indices` of a packed data set as one batch.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, each (B, T) int64.
    """
    rows = packed[list(indices)]
    names = ("input_ids", "position_ids", "labels")
    return {name: torch.as_tensor(rows[name], dtype=torch.int64) for name in names}


def micro_batches(
    packed: datasets.Dataset, indices: Sequence[int], size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The rows `indices` in batches of `size`, the last one perhaps shorter; see `collate`."""
    for start in range(0, len(indices), size):
        yield collate(packed, indices[start : start + size])
