"""What the user named as data: ``SOURCE[[:LIMIT]][=WEIGHT]``, parsed and found.

A source is a file of a format in `READERS`, packed or not, a pattern of such files, a folder,
standard input, ``-``, a Megatron pair (its prefix, ``.bin`` or ``.idx``), or, if there is no such
path, a data set of the hub: ``id``, ``id#split``, ``id:config`` or ``id:config#split``; the split
is ``train`` unless given. To add a format is to add a function to `READERS`, to add a kind of
source to give `parse_source` another `Content`.
"""

from __future__ import annotations

import glob
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np

from ee_tuning.data.cache import UNWRITABLE, standard_input, unwritable
from ee_tuning.data.folders import folder_files, saved_folder, walk
from ee_tuning.data.megatron import read_megatron
from ee_tuning.data.readers import READERS, Reader, Record
from ee_tuning.data.streams import PACKED, kind
from ee_tuning.errors import UserError, first_line
from ee_tuning.hub import check_there

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(#.+)?")
LIMIT = re.compile(r"\[:(\d+)\]$")
MEGATRON = (".bin", ".idx")
SAMPLES, SAMPLE = 16, 2**16  # parts of a file, and bytes of each, that tell its contents


class Content(Protocol):
    """Where records are, and what tells them from others; nothing is read before `records`."""

    def identity(self) -> list[Any]:
        """Differs where the contents do, as a text; of files, a `FileIdentity` each."""

    def records(self, seed: int | None) -> Iterator[Record]:
        """All records, in order; files in one that `seed` gives, if it is given."""


class FileIdentity(NamedTuple):
    """What tells a file from others: the last two whatever it is called."""

    path: str
    changed: int
    size: int
    sample: str


@dataclass(frozen=True)
class Source:
    """One source of data.

    name: as the user gave it, without the weight.
    weight: its share in the mix, or None if none was given.
    limit: records to read at most, or None.
    """

    name: str
    weight: float | None
    limit: int | None
    content: Content

    def identity(self) -> tuple[int | None, list[Any]]:
        """Differs where the records do, as a text; see `Content`."""
        return self.limit, self.content.identity()

    def records(self, seed: int) -> Iterator[Record]:
        """The records; pieces of a long text count as one.

        Files come in an order that `seed` gives, so that those that are alike are not all read
        at once; with a limit in their own, so that it is theirs.

        Raises:
            UserError: a file that cannot be read at all. A single record that is malformed has its
                `problem` set instead.
        """
        number = 0
        for record in self.content.records(seed if self.limit is None else None):
            yield record
            number += record.ends
            if number == self.limit:
                return


@dataclass(frozen=True)
class Files:
    """Files, each with the function that reads it."""

    parts: tuple[tuple[Path, Reader], ...]

    def identity(self) -> list[Any]:
        """See `Content`."""
        return [file_identity(path) for path, _ in self.parts]

    def records(self, seed: int | None) -> Iterator[Record]:
        """See `Content`."""
        numbers = range(len(self.parts))
        order = numbers if seed is None else np.random.default_rng(seed).permutation(numbers)
        for number in order:
            path, read = self.parts[number]
            yield from read(path)


@dataclass(frozen=True)
class Pair:
    """A Megatron pair."""

    tokens: Path
    index: Path

    def identity(self) -> list[Any]:
        """See `Content`."""
        return [file_identity(path) for path in (self.tokens, self.index)]

    def records(self, seed: int | None) -> Iterator[Record]:
        """See `Content`."""
        return read_megatron(self.tokens, self.index)


@dataclass(frozen=True)
class Saved:
    """A split of what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""

    folder: Path

    def identity(self) -> list[Any]:
        """See `Content`."""
        return [file_identity(path) for path in walk(self.folder)]

    def records(self, seed: int | None) -> Iterator[Record]:
        """See `Content`."""
        try:
            data = datasets.load_from_disk(str(self.folder))
        except Exception as error:  # of many kinds, as with the hub
            raise UserError(
                f"data {self.folder}: saved by datasets, but not readable ({first_line(error)})"
            ) from error
        return table_records(str(self.folder), data)


class Hub:
    """A data set of the hub."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data: datasets.Dataset | None = None

    def identity(self) -> list[Any]:
        """See `Content`."""
        return [self._loaded()._fingerprint]

    def records(self, seed: int | None) -> Iterator[Record]:
        """See `Content`."""
        return table_records(self.name, self._loaded())

    def _loaded(self) -> datasets.Dataset:
        """The split ``id``, ``id#split``, ``id:config#split`` names.

        Raises:
            UserError: no such data set, configuration or split, or no connection.
        """
        if self.data is None:
            path, _, split = self.name.partition("#")
            path, _, config = path.partition(":")
            # What `datasets` has in its cache needs no hub, and nothing of it in the hub's cache.
            if not Path(datasets.config.HF_DATASETS_CACHE, path.replace("/", "___")).is_dir():
                check_there(path, "data", "README.md", "dataset")
            try:
                self.data = datasets.load_dataset(path, config or None, split=split or "train")
            except Exception as error:  # the hub's client and each format raise errors of their own
                cause = error.__cause__ or error
                if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
                    raise unwritable(cause) from error
                raise UserError(
                    f"data {self.name}: no such file or folder here, and not loadable from the hub "
                    f"({first_line(error)})"
                ) from error
        return self.data


def table_records(name: str, data: datasets.Dataset) -> Iterator[Record]:
    """The rows of a data set as records."""
    for number, fields in enumerate(data, start=1):
        yield Record(f"{name} record {number}", fields)


def contents(identity: tuple[int | None, list[Any]]) -> Any:
    """Of a source's identity, what is the same for files that were copied or have another name."""
    limit, parts = identity
    return limit, [part[2:] if isinstance(part, FileIdentity) else part for part in parts]


def file_identity(path: Path) -> FileIdentity:
    """Told by its path, time of change, size and a hash of parts of it."""
    stat, digest = path.stat(), hashlib.sha256()
    step = max(SAMPLE, stat.st_size // SAMPLES)
    with path.open("rb") as file:
        for start in range(0, stat.st_size, step):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return FileIdentity(str(path.resolve()), stat.st_mtime_ns, stat.st_size, digest.hexdigest())


def parse_source(text: str) -> Source:
    """The source behind one argument of ``--data``.

    Raises:
        UserError: a weight or limit that is not positive; a file that does not exist, is empty or
            is of an unknown kind; a folder without readable files; half a Megatron pair.
    """
    name, weight = _split_weight(text)
    name, limit = _split_limit(name)
    if not name:
        raise UserError(f"data {text!r} names nothing: give a file, a folder or a hub id")
    return Source(name, weight, limit, _find(name))


def _split_weight(text: str) -> tuple[str, float | None]:
    name, separator, tail = text.rpartition("=")
    try:
        weight = float(tail)
    except ValueError:
        return text, None
    if not separator:
        return text, None
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"data {text}: the weight {tail} must be a positive number")
    return name, weight


def _split_limit(name: str) -> tuple[str, int | None]:
    found = LIMIT.search(name)
    if not found or "#" in name:  # a split's own slice
        return name, None
    if int(found[1]) < 1:
        raise UserError(f"data {name}: the limit {found[1]} must be at least 1")
    return name[: found.start()], int(found[1])


def _find(name: str) -> Content:
    if name == "-":
        path = standard_input()
        return Files(((path, _reader(name, path)),))
    path = Path(name).expanduser()
    if path.is_dir() or ("#" in name and Path(name.partition("#")[0]).expanduser().is_dir()):
        return _folder(name)
    if not path.exists() and glob.has_magic(name.partition("#")[0]):
        return Files(tuple(_matches(name)))
    if kind(path) not in READERS and _is_prefix(path):
        return _megatron_pair(name, path)
    if path.is_file():
        _check_file(name, path)
        return Files(((path, _reader(name, path)),))
    looks_local = kind(path) in READERS or name.startswith((".", "/", "~"))
    if looks_local or path.suffix in MEGATRON or not HUB_ID.fullmatch(name):
        _check_file(name, path)
    return Hub(name)


def _folder(name: str) -> Content:
    path, split = Path(name).expanduser(), ""
    if not path.is_dir():
        path, split = path.with_name(path.name.partition("#")[0]), path.name.partition("#")[2]
    saved = saved_folder(path, split)
    if saved:
        return Saved(saved)
    if split:
        raise UserError(f"data {name}: {path} was not saved by datasets, so it has no splits")
    return Files(tuple(folder_files(name, path)))


def _matches(pattern: str) -> Iterator[tuple[Path, Reader]]:
    """The files that `pattern` matches, ``**`` for folders within folders, in order of name."""
    found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    paths = [path for path in map(Path, found) if path.is_file() and path.stat().st_size]
    if not paths:
        limit = ", and write a limit as [:100]" if pattern.endswith("]") else ""
        raise UserError(
            f"data {pattern}: no file matches, or only empty ones: check the pattern{limit}"
        )
    for path in paths:
        yield path, _reader(str(path), path)


def _reader(name: str, path: Path) -> Reader:
    reader = READERS.get(kind(path))
    if reader is None:
        raise UserError(
            f"data file {name} is of a kind that is not read: use {', '.join(READERS)}, packed as "
            f"{', '.join(PACKED)} or not, or a folder"
        )
    return reader


def _check_file(name: str, path: Path) -> None:
    if not path.exists():
        several = ", and write several with spaces between them" if "," in name else ""
        raise UserError(f"data file {name} does not exist: check the path{several}")
    if path.stat().st_size == 0:
        raise UserError(f"data file {name} is empty: name one with text in it")


def _with_suffix(path: Path, suffix: str) -> Path:
    """`path` with `suffix` for its .bin or .idx, or appended: a prefix may have dots in it."""
    base = path.with_suffix("") if path.suffix.lower() in MEGATRON else path
    return base.with_name(base.name + suffix)


def _is_prefix(path: Path) -> bool:
    return any(_with_suffix(path, suffix).exists() for suffix in MEGATRON)


def _megatron_pair(name: str, path: Path) -> Pair:
    tokens, index = (_with_suffix(path, suffix) for suffix in MEGATRON)
    for part in (tokens, index):
        if not part.exists():
            raise UserError(
                f"data file {part} does not exist: Megatron data {name} needs both .bin and .idx"
            )
        _check_file(str(part), part)
    return Pair(tokens, index)
