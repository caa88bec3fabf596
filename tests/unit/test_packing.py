"""Packing: whatever the documents, nothing is lost and no piece reaches into another."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ee_tuning.data.packing import pack

PAD = 999
LENGTHS = st.lists(st.integers(1, 20), max_size=12)


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Documents of the given lengths in which every token is different."""
    return np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]) if lengths else []


def cut(row: dict[str, np.ndarray]) -> list[slice]:
    starts = np.flatnonzero(row["position_ids"] == 0)
    stops = [*starts[1:], len(row["position_ids"])]
    return [slice(a, b) for a, b in zip(starts, stops, strict=True)]


@given(LENGTHS, st.integers(2, 9))
def test_every_token_once_and_in_order(lengths, seq_length):
    rows = list(pack([(ids, ids) for ids in documents_of(lengths)], seq_length, PAD))
    tokens = [t for row in rows for t in row["input_ids"].tolist()]
    total = sum(lengths)
    assert tokens == [*range(total), *[PAD] * (-total % seq_length)]
    assert all(len(column) == seq_length for row in rows for column in row.values())


@given(LENGTHS, st.integers(2, 9))
def test_a_piece_is_of_one_document_and_counts_from_0(lengths, seq_length):
    documents = documents_of(lengths)
    owner = {t: i for i, ids in enumerate(documents) for t in ids.tolist()} | {PAD: -1}
    previous = None
    for row in pack([(ids, ids) for ids in documents], seq_length, PAD):
        for number, piece in enumerate(cut(row)):
            owners = {owner[t] for t in row["input_ids"][piece].tolist()}
            assert len(owners) == 1
            assert owners != previous or number == 0  # one document is cut by a row's end alone
            previous = owners
            length = piece.stop - piece.start
            assert row["position_ids"][piece].tolist() == list(range(length))


@given(LENGTHS, st.integers(2, 9), st.data())
def test_labels_follow_their_tokens(lengths, seq_length, data):
    documents = documents_of(lengths)
    masks = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    labels = [np.where(mask, ids, -100) for mask, ids in zip(masks, documents, strict=True)]
    wanted = {
        t: label
        for ls, ids in zip(labels, documents, strict=True)
        for t, label in zip(ids, ls, strict=True)
    }
    for row in pack(zip(documents, labels, strict=True), seq_length, PAD):
        for piece in cut(row):
            ids, found = row["input_ids"][piece].tolist(), row["labels"][piece].tolist()
            assert found == [-100, *[wanted.get(t, -100) for t in ids[1:]]]
