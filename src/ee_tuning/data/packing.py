"""Documents of any length, cut into rows of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ee_tuning.losses import IGNORED


def pack(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], seq_length: int, pad_id: int
) -> Iterator[dict[str, np.ndarray]]:
    """Concatenate documents and cut them into rows of exactly `seq_length`.

    A document that does not fit is cut; its rest starts the next row as a piece of its own.
    Positions restart at 0 with each piece, which is how the model side knows where attention
    ends, and the first label of a piece is -100: nothing before it predicts it. The last row is
    filled up with a piece of `pad_id` without labels.

    Args:
        documents: pairs of token ids and labels, each (n,) of integers.

    Yields:
        ``input_ids``, ``position_ids`` and ``labels``, each (seq_length,) int32.
    """
    row, filled = _new_row(seq_length), 0
    for ids, labels in documents:
        start = 0
        while start < len(ids):
            stop = min(start + seq_length - filled, len(ids))
            _add_piece(row, filled, ids[start:stop], labels[start:stop])
            filled, start = filled + stop - start, stop
            if filled == seq_length:
                yield row
                row, filled = _new_row(seq_length), 0
    if filled:
        padding = np.full(seq_length - filled, pad_id)
        _add_piece(row, filled, padding, np.full_like(padding, IGNORED))
        yield row


def _new_row(seq_length: int) -> dict[str, np.ndarray]:
    names = ("input_ids", "position_ids", "labels")
    return {name: np.empty(seq_length, dtype=np.int32) for name in names}


def _add_piece(row: dict[str, np.ndarray], start: int, ids: np.ndarray, labels: np.ndarray) -> None:
    stop = start + len(ids)
    row["input_ids"][start:stop] = ids
    row["position_ids"][start:stop] = np.arange(len(ids))
    row["labels"][start:stop] = labels
    row["labels"][start : start + 1] = IGNORED
