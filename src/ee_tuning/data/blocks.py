"""The packed rows of one source, in blocks on disk that are made one after the other.

A block is some `BLOCK_TOKENS` tokens: their documents are shuffled, joined and cut into rows. What
is in it depends on the source, the settings and its number alone, so it may be removed and made
again. A row is stored as its token ids and, per token, whether a piece of text starts there and
whether it is learned: 5 bytes.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ee_tuning.data.cache import alone, cache_folder, key_of, used, written
from ee_tuning.data.encode import Document, Encoded, Encoder
from ee_tuning.data.packing import pack
from ee_tuning.data.sources import Source
from ee_tuning.errors import Notice, UserError
from ee_tuning.losses import IGNORED

FORMAT = 2  # part of every name: raise it when rows come out differently
BLOCK_TOKENS = 2**23
STARTS, LEARNED = 1, 2  # flags of a token


@dataclass(frozen=True)
class Layout:
    """How the documents of a source become rows.

    tokens: of a block, about.
    number: of the source among those of a run.
    """

    seq_length: int
    seed: int
    pad_id: int
    skip_bad_records: bool
    tokens: int

    @property
    def row(self) -> np.dtype:
        """A row as it is stored."""
        shape = (self.seq_length,)
        return np.dtype([("ids", "<i4", shape), ("flags", "u1", shape)])


@dataclass
class Tally:
    """What a block holds, and what was read for it; written beside it when it is whole.

    position: documents and problems of the source up to its end.
    longest: tokens of its longest document.
    problem: the first of its bad records'.
    last: nothing comes after it.
    """

    rows: int = 0
    position: int = 0
    records: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    bad: int = 0
    problem: str = ""
    last: bool = False

    def add(self, encoded: Encoded) -> None:
        """Count a record, or a piece of one."""
        self.position += 1
        self.records += encoded.record.begins
        self.bad += bool(encoded.problem)
        self.problem = self.problem or encoded.problem
        self.longest = max(self.longest, *(len(document.ids) for document in encoded.documents), 0)


class Blocks:
    """The rows of `source`, numbered from 0, made when they are asked for."""

    def __init__(self, source: Source, encoder: Encoder, layout: Layout) -> None:
        self.source, self.encoder, self.layout = source, encoder, layout
        self.identity = source.identity()
        self.key = key_of(FORMAT, self.identity, encoder.identity(), layout)
        self.tallies: list[Tally] = []
        self.ends = np.zeros(1, dtype=np.int64)  # rows up to each block's end, after a 0
        self._lock = threading.RLock()  # blocks may be made ahead by a thread
        self._stream: Iterator[Encoded] | None = None  # stands after the last block that was made

    @property
    def done(self) -> bool:
        """Whether every block is known."""
        return bool(self.tallies) and self.tallies[-1].last

    def prepare(self, rows: int) -> int:
        """How many rows there are, of which `rows` are asked for: fewer if there are no more.

        Raises:
            UserError: a source that cannot be read, or has nothing to learn from.
        """
        while self.ends[-1] < rows and not self.done:
            with self._lock:
                if self.ends[-1] < rows and not self.done:
                    self._add(self._make(len(self.tallies)))
        return int(self.ends[-1])

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Those rows, (n,) of ``layout.row``, which `prepare` has found."""
        found = np.empty(len(rows), dtype=self.layout.row)
        blocks = np.searchsorted(self.ends, rows, side="right") - 1
        for block in np.unique(blocks):
            mine = blocks == block
            found[mine] = self._stored(int(block))[rows[mine] - self.ends[block]]
        return found

    def total(self) -> Tally:
        """The counts of all blocks that are known."""
        names = ("rows", "records", "tokens", "learned", "bad")
        sums = {name: sum(getattr(tally, name) for tally in self.tallies) for name in names}
        longest = max((tally.longest for tally in self.tallies), default=0)
        problem = next((tally.problem for tally in self.tallies if tally.bad), "")
        return Tally(**sums, longest=longest, problem=problem, last=self.done)

    def _add(self, tally: Tally) -> None:
        self.tallies.append(tally)
        self.ends = np.append(self.ends, self.ends[-1] + tally.rows)
        if tally.bad:
            warnings.warn(
                f"{tally.bad} bad records skipped, the first: {tally.problem}", Notice, stacklevel=2
            )
        if tally.last and not self.ends[-1]:
            raise _nothing_to_learn(self.source.name, self.total())

    def _path(self, number: int) -> Path:
        return cache_folder() / f"{self.key}-{number}.npy"

    def _stored(self, number: int) -> np.ndarray:
        """The rows of a block, made again if it was removed or is broken."""
        for _ in range(2):
            try:
                return opened(self._path(number), self.layout.row, self.tallies[number].rows)
            except (OSError, ValueError):
                with self._lock:
                    self._make(number, again=True)
        raise UserError(
            f"the data that were prepared in {cache_folder()} vanish while they are needed: raise "
            "the cache's bound"
        )

    def _make(self, number: int, again: bool = False) -> Tally:
        """Read a block's tally, or make the block. again: it was there, and is not any more."""
        path, description = self._path(number), self._path(number).with_suffix(".json")
        known = None if again else _described(description)
        if known:
            return known
        with alone(path):
            known = None if again else _described(description)
            if known:
                return known
            try:
                return self._write(number, path, description)
            except BaseException:
                self._stream = None
                raise

    def _write(self, number: int, path: Path, description: Path) -> Tally:
        documents, tally = self._collect(number)
        order = np.random.default_rng([self.layout.seed, number]).permutation(len(documents))
        chosen = (documents[i] for i in order)
        pairs = ((ids, np.where(counts, ids, IGNORED)) for ids, counts in chosen)
        packed = pack(pairs, self.layout.seq_length, self.layout.pad_id)
        rows = [self._packed(row) for row in packed]
        tally.rows = len(rows)
        with written(path) as file:
            np.save(file, np.array(rows, dtype=self.layout.row))
        with written(description) as file:
            file.write(json.dumps(dataclasses.asdict(tally)).encode())
        return tally

    def _packed(self, row: dict[str, np.ndarray]) -> np.ndarray:
        stored = np.empty((), dtype=self.layout.row)
        stored["ids"] = row["input_ids"]
        stored["flags"] = STARTS * (row["position_ids"] == 0) + LEARNED * (row["labels"] != IGNORED)
        return stored

    def _collect(self, number: int) -> tuple[list[Document], Tally]:
        """The documents of a block that have something to learn."""
        before = self.tallies[number - 1].position if number else 0
        if self._stream is None or number < len(self.tallies):
            records = self.source.records(self.layout.seed)
            self._stream = self.encoder.encode(records, skip=before)
        documents: list[Document] = []
        tally = Tally(position=before, last=True)
        for encoded in self._stream:
            if encoded.problem and not self.layout.skip_bad_records:
                raise UserError(encoded.problem)
            tally.add(encoded)
            for document in encoded.documents:
                if document.counts.any():
                    documents.append(document)
                    tally.tokens += len(document.ids)
                    tally.learned += int(document.counts.sum())
            if tally.tokens >= self.layout.tokens:
                tally.last = False
                break
        if number < len(self.tallies) - 1:  # made again, while others after it are there
            self._stream = None
        return documents, tally


def _described(description: Path) -> Tally | None:
    """The tally of a block, of which the rows may have given way to others."""
    try:
        return Tally(**json.loads(description.read_text()))
    except (OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=256)
def opened(path: Path, row: np.dtype, rows: int) -> np.ndarray:
    """The rows of a block, mapped into memory.

    Raises:
        OSError, ValueError: it is not there, or not what it should be.
    """
    found = np.load(path, mmap_mode="r" if rows else None)
    if found.dtype != row or len(found) != rows:
        raise ValueError(f"{path} holds something else")
    used(path)
    return found


def _nothing_to_learn(name: str, total: Tally) -> UserError:
    if not total.records:
        return UserError(f"data {name} has no records or readable text in it: name one that has")
    if total.bad == total.records:
        return UserError(f"every record in {name} is bad, the first: {total.problem}")
    if total.longest < 2:
        return UserError(
            f"every document in {name} is too short: none has the 2 tokens it takes to predict one"
        )
    return UserError(
        f"no document in {name} has a token to learn: chats need a turn of the assistant, "
        "prompts a completion"
    )
