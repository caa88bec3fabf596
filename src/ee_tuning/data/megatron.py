"""Documents of a Megatron pair: ``.bin`` with raw tokens, ``.idx`` with where they are.

The index is a magic, uint64 version 1, uint8 type code, uint64 number of sequences, uint64 number
of document bounds; then per sequence its length (int32) and its first byte in ``.bin`` (int64),
then the bounds (int64): document ``i`` is the sequences ``bounds[i]`` to ``bounds[i + 1]``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ee_tuning.data.readers import Record
from ee_tuning.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True)
class Index:
    """The parsed ``.idx``: lengths (n,) int32, pointers (n,) int64 in bytes, bounds (d,) int64."""

    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    bounds: np.ndarray


def read_megatron(tokens: Path, index: Path) -> Iterator[Record]:
    """The token ids of each document; end-of-text tokens are already among them.

    Raises:
        UserError: a corrupt index.
    """
    found = read_index(index)
    if (found.pointers + found.lengths.astype(np.int64) * found.dtype.itemsize).max(
        initial=0
    ) > tokens.stat().st_size:
        raise _corrupt(index, f"it points beyond the end of {tokens.name}")
    stored = np.memmap(tokens, dtype=np.uint8, mode="r")
    for number, (first, last) in enumerate(zip(found.bounds, found.bounds[1:], strict=False)):
        ids = _document(stored, found, int(first), int(last))
        yield Record(f"{tokens} document {number + 1}", tokens=ids)


def _document(stored: np.ndarray, index: Index, first: int, last: int) -> np.ndarray:
    size = index.dtype.itemsize
    spans = zip(index.pointers[first:last], index.lengths[first:last], strict=True)
    pieces = [stored[p : p + int(n) * size].view(index.dtype) for p, n in spans]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=index.dtype)


def read_index(path: Path) -> Index:
    """Read and check a ``.idx``.

    Raises:
        UserError: wrong magic, version, type of token or sizes that contradict each other.
    """
    data = path.read_bytes()
    if not data.startswith(MAGIC) or len(data) < HEADER.size:
        raise _corrupt(path, "it does not begin with Megatron's magic and header")
    _, version, code, num_sequences, num_bounds = HEADER.unpack_from(data)
    if version != 1 or code not in DTYPES:
        raise _corrupt(path, f"version {version} with token type {code} is not known")
    wanted = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if len(data) < wanted:
        raise _corrupt(path, f"it has {len(data)} bytes where its header wants {wanted}")
    pointers_at = HEADER.size + 4 * num_sequences
    index = Index(
        dtype=np.dtype(DTYPES[code]).newbyteorder("<"),
        lengths=np.frombuffer(data, "<i4", num_sequences, HEADER.size),
        pointers=np.frombuffer(data, "<i8", num_sequences, pointers_at),
        bounds=np.frombuffer(data, "<i8", num_bounds, pointers_at + 8 * num_sequences),
    )
    _check(path, index)
    return index


def _check(path: Path, index: Index) -> None:
    if len(index.lengths) and min(index.lengths.min(), index.pointers.min()) < 0:
        raise _corrupt(path, "it has negative sizes or pointers")
    bounds = index.bounds
    inside = len(bounds) >= 2 and bounds[0] == 0 and bounds[-1] == len(index.lengths)
    if not inside or (np.diff(bounds) < 0).any():
        raise _corrupt(path, f"its documents do not cover its {len(index.lengths)} sequences")


def _corrupt(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: not a usable Megatron index: {reason}; make the pair again")
