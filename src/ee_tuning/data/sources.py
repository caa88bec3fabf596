"""What the user named as data: ``PATH_OR_HUB_ID[=WEIGHT]``, parsed and found.

A local path is a text file (``.txt``, ``.md``: one document), records (``.jsonl``, ``.json``,
``.parquet``), a folder, or a Megatron pair (its prefix, ``.bin`` or ``.idx``). Anything that is
not a path is a data set of the hub: ``id``, ``id#split``, ``id:config`` or ``id:config#split``;
the split is ``train`` unless given.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ee_tuning.errors import UserError

Kind = Literal["text", "records", "folder", "megatron", "hub"]
KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "records",
    ".json": "records",
    ".parquet": "records",
    ".bin": "megatron",
    ".idx": "megatron",
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(#.+)?")


@dataclass(frozen=True)
class Source:
    """One source of data.

    name: as the user gave it, without the weight.
    weight: its share in the mix, or None if none was given.
    files: what to read, in order; for a Megatron pair its ``.bin`` and ``.idx``; none for the hub.
    """

    name: str
    weight: float | None
    kind: Kind
    files: tuple[Path, ...] = ()

    def identity(self) -> list[tuple[str, int, int]]:
        """Path, size and time of change of each file: a changed file is different data."""
        stats = ((path.resolve(), path.stat()) for path in self.files)
        return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def parse_source(text: str) -> Source:
    """The source behind one argument of ``--data``.

    Raises:
        UserError: a weight that is not positive; a file that does not exist, is empty or is of
            an unknown kind; a folder without readable files; half a Megatron pair.
    """
    name, weight = _split_weight(text)
    if not name:
        raise UserError(f"data {text!r} names nothing: give a file, a folder or a hub id")
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, weight, path)
    if path.is_file() and path.suffix.lower() not in KINDS:
        raise UserError(
            f"data file {name} is of a kind that is not read: use {', '.join(KINDS)} or a folder"
        )
    kind = KINDS.get(path.suffix.lower())
    if kind == "megatron" or (kind is None and _is_prefix(path)):
        return Source(name, weight, "megatron", _megatron_pair(name, path))
    if kind is not None:
        _check_file(name, path)
        return Source(name, weight, kind, (path,))
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        _check_file(name, path)
    return Source(name, weight, "hub")


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


def _check_file(name: str, path: Path) -> None:
    if not path.exists():
        raise UserError(f"data file {name} does not exist: check the path")
    if path.stat().st_size == 0:
        raise UserError(f"data file {name} is empty: name one with text in it")


def _with_suffix(path: Path, suffix: str) -> Path:
    """`path` with `suffix` for its .bin or .idx, or appended: a prefix may have dots in it."""
    base = path.with_suffix("") if path.suffix.lower() in (".bin", ".idx") else path
    return base.with_name(base.name + suffix)


def _is_prefix(path: Path) -> bool:
    return any(_with_suffix(path, suffix).exists() for suffix in (".bin", ".idx"))


def _megatron_pair(name: str, path: Path) -> tuple[Path, Path]:
    tokens, index = _with_suffix(path, ".bin"), _with_suffix(path, ".idx")
    for part in (tokens, index):
        if not part.exists():
            raise UserError(
                f"data file {part} does not exist: Megatron data {name} needs both .bin and .idx"
            )
        _check_file(str(part), part)
    return tokens, index


def _folder(name: str, weight: float | None, folder: Path) -> Source:
    files = [path for path in _walk(folder) if path.is_file() and path.stat().st_size > 0]
    records = tuple(path for path in files if path.suffix.lower() in (".jsonl", ".parquet"))
    if records:
        return Source(name, weight, "records", records)
    if not files:
        raise UserError(f"data folder {name} has no files to read: name one with text in it")
    return Source(name, weight, "folder", tuple(files))


def _walk(folder: Path) -> Iterator[Path]:
    """All files below `folder` in a fixed order, without hidden ones."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))
