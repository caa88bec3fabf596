"""Records of a file, whatever it is stored in: a function per format, and `READERS`, by ending."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ee_tuning.data.streams import reading, reading_text
from ee_tuning.errors import UserError

PIECE = 2**18  # characters of a text that are read, and become tokens, at once
ROWS = 256  # of a table in memory
ARROW_FILE = b"ARROW1"


@dataclass(frozen=True)
class Record:
    """One record, or a piece of a long text, and the place it comes from, for messages.

    tokens: of a document that is stored as such, (n,) of integers, end of text included.
    problem: why the record cannot be used, if so; it is up to the caller to stop or go on.
    begins, ends: False for a piece of a text that has others before it, or after it.
    """

    where: str
    fields: dict[str, Any] = field(default_factory=dict)
    tokens: np.ndarray | None = None
    problem: str = ""
    begins: bool = True
    ends: bool = True


Reader = Callable[[Path], Iterator[Record]]


def read_text(path: Path) -> Iterator[Record]:
    """A text as one record, or as pieces of it, if it is long.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        with reading(path) as stream:
            yield from pieces(str(path), reading_text(stream))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}): convert it first") from None


def pieces(where: str, stream: TextIO) -> Iterator[Record]:
    """A text in pieces of about `PIECE` characters that end with a line or a word, if they can."""
    text, begins = stream.read(PIECE), True
    while True:
        more = stream.read(PIECE) if len(text) >= PIECE else ""
        if not more:
            yield Record(where, {"text": text}, begins=begins)
            return
        cut = text.rfind("\n") + 1 or max(text.rfind(" "), 0) or len(text)
        yield Record(where, {"text": text[:cut]}, begins=begins, ends=False)
        text, begins = text[cut:] + more, False


def read_json_lines(path: Path) -> Iterator[Record]:
    """One record per line; empty lines are passed over."""
    with reading(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _json_line(f"{path} line {number}", line)


def _json_line(where: str, line: bytes) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, or too deeply nested
        return Record(where, problem=f"{where}: not valid JSON ({error})")
    return _object(where, value)


def _object(where: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(where, value)
    found = type(value).__name__
    return Record(where, problem=f"{where}: a JSON object is wanted, not a {found}")


def read_json(path: Path) -> Iterator[Record]:
    """A list of objects; or one per line; or one after the other, over as many lines as they take.

    Raises:
        UserError: it is not JSON. Of objects on a line each, a malformed one has its `problem` set.
    """
    if _has_object_lines(path):
        yield from read_json_lines(path)
        return
    number = 0
    try:
        with reading(path) as stream:
            for number, value in enumerate(json_values(reading_text(stream)), start=1):
                yield _object(f"{path} record {number}", value)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise UserError(
            f"{path}: not valid JSON ({reason}, record {number + 1}): correct the file"
        ) from None


def _has_object_lines(path: Path) -> bool:
    """Whether the first line holds an object, or looks like one beside that of the second."""
    with reading(path) as stream:
        filled = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in iter_lines(stream))
        first, second = (next(filter(None, filled), b"") for _ in range(2))
    if not first.startswith(b"{"):
        return False
    return len(first) >= PIECE or second.startswith(b"{") or not _json_line("", first).problem


def iter_lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of `stream`, of long ones `PIECE` bytes at a time."""
    return iter(lambda: stream.readline(PIECE), b"")


def json_values(stream: TextIO) -> Iterator[Any]:
    """The items of a JSON list, or values one after the other, without all of them in memory.

    Raises:
        ValueError, RecursionError: it is not JSON, or nested too deeply.
    """
    buffer = _Buffer(stream)
    listed = buffer.take("[")
    if listed and buffer.take("]"):
        return
    while listed or buffer.peek():
        yield buffer.value()
        if listed and not buffer.take(","):
            if buffer.take("]") and not buffer.peek():
                return
            raise ValueError("a list goes on or ends with neither a comma nor a bracket")


class _Buffer:
    """As much of a stream of JSON as the next value takes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text, self.at = stream, "", 0

    def peek(self) -> str:
        """The next character that is no white space, or nothing at the end."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self._read(PIECE):
                return ""

    def take(self, character: str) -> bool:
        """Step over `character` if it is next."""
        is_next = self.peek() == character
        self.at += is_next
        return is_next

    def value(self) -> Any:
        """Step over the next value."""
        self.peek()
        size, decoder = PIECE, json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or not self._read(size):
                    self.at = end
                    return value
            except ValueError:  # perhaps because it is not all there
                if not self._read(size):
                    raise
            size *= 2

    def _read(self, size: int) -> bool:
        """Add `size` characters to what is left, if there are any."""
        more = self.stream.read(size)
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Record]:
    """One record per row; the first row names the fields.

    Raises:
        UserError: it is not UTF-8.
    """
    csv.field_size_limit(sys.maxsize)
    number = 1
    try:
        with reading(path) as stream:
            text = reading_text(stream, newline="")
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            for number, fields in enumerate(rows, start=1):
                where = f"{path} row {number}"
                more = None in fields  # where `csv` puts what no name is for
                problem = f"{where}: it has more fields than the first row names" if more else ""
                yield Record(where, {} if more else fields, problem=problem)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}): convert it first") from None
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV after row {number} ({error})") from None


def read_parquet(path: Path) -> Iterator[Record]:
    """One record per row.

    Raises:
        UserError: it is truncated or corrupt.
    """
    with reading(path) as stream, pq.ParquetFile(stream) as file:
        yield from _table_records(path, file.iter_batches(batch_size=ROWS))


def read_arrow(path: Path) -> Iterator[Record]:
    """One record per row of an Arrow IPC file or stream.

    Raises:
        UserError: it is truncated or corrupt.
    """
    with reading(path) as stream:
        is_file = stream.read(len(ARROW_FILE)) == ARROW_FILE
        stream.seek(0)
        if is_file:
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(stream))
        yield from _table_records(path, batches)


def _table_records(path: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    rows = (
        row
        for batch in batches
        for start in range(0, batch.num_rows, ROWS)
        for row in batch.slice(start, ROWS).to_pylist()
    )
    for number, fields in enumerate(rows, start=1):
        yield Record(f"{path} record {number}", fields)


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
