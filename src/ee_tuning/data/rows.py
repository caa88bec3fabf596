"""Rows of several sources as one sequence that grows as it is read; mixing and splitting."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ee_tuning.data.blocks import LEARNED, STARTS, Blocks
from ee_tuning.errors import UserError
from ee_tuning.losses import IGNORED

SHIFT = 40  # a place is the number of a source, shifted, and of a row of it
DRAWN = 1024  # places at once


class Rows:
    """Packed rows, each ``input_ids``, ``position_ids`` and ``labels`` of (T,) int64.

    They are prepared when they are asked for, so `count` is to be preferred to `len`, which takes
    all of them.

    window: rows within which a first epoch is shuffled, so that no more need to be ready.
    """

    def __init__(
        self, sources: Sequence[Blocks], places: Iterator[np.ndarray], window: int
    ) -> None:
        self.sources, self.window = sources, window
        self._coming, self._lock = places, threading.RLock()
        self._places = np.empty(0, dtype=np.int64)
        self._ended = False
        self._thread: threading.Thread | None = None

    def count(self, most: int) -> int:
        """How many rows there are, but at most `most`.

        Raises:
            UserError: see `Blocks.prepare`.
        """
        while len(self._places) < most and not self._ended:
            with self._lock:
                if len(self._places) < most:
                    more = next(self._coming, None)
                    self._ended = more is None
                    if more is not None:
                        self._places = np.concatenate([self._places, more])
        return min(most, len(self._places))

    def ahead(self, most: int) -> None:
        """Prepare `most` rows in the background; what goes wrong is told by `count`."""
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and len(self._places) < most and not self._ended:
            self._thread = threading.Thread(target=self._try_count, args=(most,), daemon=True)
            self._thread.start()

    def places(self) -> Iterator[np.ndarray]:
        """Where the rows are, in order, some at a time."""
        done = 0
        while self.count(done + 1) > done:
            known = self._places
            yield known[done:]
            done = len(known)

    def first_places(self) -> np.ndarray:
        """Where the rows of the first window are."""
        return self._places[: self.count(self.window)]

    def __len__(self) -> int:
        return self.count(sys.maxsize)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        row = 0
        while self.count(row + 1) > row:
            yield self[row]
            row += 1

    def __getitem__(self, index: Any) -> Any:
        """A row, or several of a slice or list stacked to (n, T)."""
        if isinstance(index, int | np.integer):
            return {name: values[0] for name, values in self[[index]].items()}
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        numbers = np.array(index, dtype=np.int64)
        if len(numbers) and self.count(int(numbers.max()) + 1) <= numbers.max():
            raise IndexError(f"there are only {len(self)} rows")
        places = self._places[numbers]
        row = self.sources[0].layout.row
        stored, owners = np.empty(len(places), dtype=row), places >> SHIFT
        for owner in np.unique(owners):
            mine = owners == owner
            stored[mine] = self.sources[owner].read(places[mine] & ((1 << SHIFT) - 1))
        return _unpacked(stored)

    def _try_count(self, most: int) -> None:
        try:
            self.count(most)
        except Exception:
            return


def _unpacked(stored: np.ndarray) -> dict[str, torch.Tensor]:
    ids = stored["ids"].astype(np.int64)
    at = np.arange(ids.shape[1])
    starts = np.where(stored["flags"] & STARTS, at, 0)
    arrays = {
        "input_ids": ids,
        "position_ids": at - np.maximum.accumulate(starts, axis=1),
        "labels": np.where(stored["flags"] & LEARNED, ids, IGNORED),
    }
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def in_turns(sources: Sequence[Blocks]) -> Iterator[np.ndarray]:
    """Places of every row once, a block of each source in turn."""
    taken = [0] * len(sources)
    going = list(range(len(sources)))
    while going:
        for number in list(going):
            rows = sources[number].prepare(taken[number] + 1)
            if rows == taken[number]:
                going.remove(number)
                continue
            yield (number << SHIFT) + np.arange(taken[number], rows)
            taken[number] = rows


def drawn(sources: Sequence[Blocks], weights: Sequence[float], seed: int) -> Iterator[np.ndarray]:
    """Places drawn with shares in proportion to `weights`.

    A source that runs out starts again, until all were read in full.
    """
    shares, random = np.array(weights) / sum(weights), np.random.default_rng(seed)
    taken, unread = [0] * len(sources), set(range(len(sources)))
    while unread:
        places = []
        for number in random.choice(len(sources), size=DRAWN, p=shares).tolist():
            places.append((number << SHIFT) + taken[number])
            taken[number] += 1
            if sources[number].prepare(taken[number] + 1) == taken[number]:
                unread.discard(number)
                taken[number] = 0
            if not unread:
                break
        yield np.array(places, dtype=np.int64)


def split_validation(packed: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Hold out a share of the first window's rows, at least one, chosen by `seed`.

    A row that the mix repeats is held out in all its places, and stands in the second part once.

    Returns:
        The rows to train on and the rows held out.

    Raises:
        UserError: `fraction` is not between 0 and 1, or there is only one row.
    """
    if not 0 < fraction < 1:
        raise UserError(f"valid_fraction is {fraction}: it must be above 0 and below 1")
    first = packed.first_places()
    unique, where = np.unique(first, return_index=True)
    if len(unique) < 2:
        raise UserError(
            "the data fill just one sequence, so none can be held out for validation: "
            "give more data, a shorter --seq-length, or --valid-data"
        )
    count = min(max(round(fraction * len(unique)), 1), len(unique) - 1)
    held_out = np.sort(np.random.default_rng(seed).permutation(len(unique))[:count])
    kept = (places[~np.isin(places, unique[held_out])] for places in packed.places())
    valid = first[np.sort(where[held_out])]
    return (
        Rows(packed.sources, kept, packed.window),
        Rows(packed.sources, iter([valid]), packed.window),
    )
