"""Records of a source, whatever it is stored in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ee_tuning.data.sources import Source
from ee_tuning.errors import UserError, first_line


@dataclass(frozen=True)
class Record:
    """One record and the place it comes from, for messages.

    problem: why the record cannot be used, if so; it is up to the caller to stop or go on.
    """

    where: str
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def file_records(source: Source) -> Iterator[Record]:
    """The records of all files of `source`, in order.

    Raises:
        UserError: a text file that is not UTF-8, a ``.json`` list or parquet file that cannot be
            read at all. A single malformed record has its `problem` set instead.
    """
    for path in source.files:
        if source.kind == "folder":
            yield from _text_or_nothing(path)
        elif source.kind == "text":
            yield Record(str(path), {"text": _read_text(path)})
        elif path.suffix.lower() == ".parquet":
            yield from _parquet_records(path)
        else:
            yield from _json_records(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}): convert it first") from None


def _text_or_nothing(path: Path) -> Iterator[Record]:
    """A file of a folder, or nothing if it is not text: folders hold pictures and archives too."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return
    if "\0" not in text:
        yield Record(str(path), {"text": text})


def _json_records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.suffix.lower() == ".json" and start.startswith(b"["):
        yield from _json_list(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_line(f"{path} line {number}", line)


def _json_line(where: str, line: bytes) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:  # malformed JSON or not UTF-8
        return Record(where, problem=f"{where}: not valid JSON ({error})")
    return _object(where, value)


def _json_list(path: Path) -> Iterator[Record]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): correct the file") from None
    for number, value in enumerate(values, start=1):
        yield _object(f"{path} record {number}", value)


def _object(where: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(where, value)
    kind = type(value).__name__
    return Record(where, problem=f"{where}: a JSON object is wanted, not a {kind}")


def _parquet_records(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{path} record {number}", fields)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not readable as parquet after record {number} ({first_line(error)}): "
            "the file is truncated or corrupt, get it again"
        ) from None


def load_hub(name: str) -> datasets.Dataset:
    """The split of a data set of the hub: ``id``, ``id#split``, ``id:config#split``.

    Raises:
        UserError: no such data set, configuration or split, or no connection.
    """
    path, _, split = name.partition("#")
    path, _, config = path.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # the hub's client and each file format raise errors of their own
        raise UserError(
            f"data {name}: no such file or folder here, and not loadable from the hub "
            f"({first_line(error)})"
        ) from error


def hub_records(name: str, dataset: datasets.Dataset) -> Iterator[Record]:
    """The rows of a data set of the hub as records."""
    for number, fields in enumerate(dataset, start=1):
        yield Record(f"{name} record {number}", fields)
