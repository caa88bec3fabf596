"""What is kept on disk: where, how it is written, and that it stays within bounds."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import datasets
from filelock import FileLock

from ee_tuning.errors import UserError

BOUND = "EE_TUNING_CACHE_GIB"  # environment variable
DEFAULT_GIB = 64.0
DAY = 24 * 3600
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def cache_folder() -> Path:
    """The folder for packed data; it can be removed at any time at which no run needs it."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "ee_tuning"


def key_of(*parts: Any) -> str:
    """A name that differs where `parts` do, as texts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@contextmanager
def writable() -> Iterator[None]:
    """Inside, a cache that cannot be written is a UserError."""
    try:
        yield
    except OSError as error:
        raise unwritable(error) from error


def unwritable(error: OSError) -> UserError:
    """What is wrong with the cache, and what to do."""
    return UserError(
        f"the cache in {datasets.config.HF_DATASETS_CACHE} cannot be written "
        f"({error.strerror or error}): free some space, or name another folder with the "
        "environment variable HF_DATASETS_CACHE"
    )


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process of this machine prepares `path`.

    Raises:
        UserError: the cache cannot be written.
    """
    with writable():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write, at `path` once it is whole; older ones give way to it.

    Raises:
        UserError: the cache cannot be written.
    """
    with writable():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("xb") as file:  # with the mode of new files, as caches may be shared
                yield file
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        make_room(path)


def used(path: Path) -> None:
    """Note that `path` is in use, so that others give way before it does."""
    try:
        os.utime(path)
    except OSError:  # somebody else's cache, or gone: then it is prepared again
        return


def make_room(newest: Path) -> None:
    """Remove what was used longest ago until the cache is within its bound; never `newest`.

    Raises:
        UserError: the bound that the environment gives is no number.
    """
    given = os.environ.get(BOUND, "")
    try:
        left = float(given or DEFAULT_GIB) * 2**30
    except ValueError:
        raise UserError(f"{BOUND} is {given!r}: give the cache's bound in GiB") from None
    for path, stat in sorted(_files(newest.parent), key=lambda item: -item[1].st_mtime):
        left -= stat.st_size
        abandoned = path.suffix == ".part" and time.time() - stat.st_mtime > DAY
        if (left < 0 or abandoned) and path != newest and path.suffix not in (".lock", ".json"):
            path.unlink(missing_ok=True)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        try:
            yield path, path.stat()
        except FileNotFoundError:  # another process removed it
            continue


def standard_input() -> Path:
    """A file with all that standard input brings: ``.json``, or ``.txt`` if it is no JSON.

    Raises:
        UserError: it brings nothing, several processes would read it, or it cannot be kept.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("standard input is read by a single process: write the data to a file")
    digest, start = hashlib.sha256(), b""
    folder = cache_folder()
    spool = folder / "input"
    with written(spool) as file:
        while chunk := sys.stdin.buffer.read(2**20):
            start = start or chunk.removeprefix(b"\xef\xbb\xbf").lstrip()
            digest.update(chunk)
            file.write(chunk)
    if not start:
        spool.unlink(missing_ok=True)
        raise UserError("standard input is empty: pipe records or text into it")
    ending = ".json" if start.startswith((b"{", b"[")) else ".txt"
    path = folder / f"input-{digest.hexdigest()[:32]}{ending}"
    os.replace(spool, path)
    return path
