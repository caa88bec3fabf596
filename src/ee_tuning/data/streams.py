"""A file's bytes in order, unpacked where its name says that it is packed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from ee_tuning.errors import UserError, first_line


def _open_zstandard(path: Path, mode: str) -> Any:
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


PACKED: dict[str, Callable[[Path, Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


def kind(path: Path) -> str:
    """The ending that says what is in a file: ``.jsonl`` of ``a.jsonl`` and of ``a.jsonl.gz``."""
    packed = path.suffix.lower() in PACKED
    return (Path(path.stem) if packed else path).suffix.lower()


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The bytes of `path`, unpacked.

    Raises:
        UserError: what is inside the ``with`` cannot read on.
    """
    opener = PACKED.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as stream:
            yield stream
    except BROKEN as error:
        raise UserError(
            f"{path}: not readable as {kind(path)[1:] or 'text'} ({first_line(error)}): if it is "
            "truncated or corrupt, get it again"
        ) from None


def reading_text(stream: BinaryIO, newline: str | None = None) -> io.TextIOWrapper:
    """`stream` as UTF-8 text, with or without a byte order mark; `newline` as for `open`."""
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)
