"""Writing files so that a crash, a full disk or a second writer never leaves half of one."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from safetensors import SafetensorError

from ee_tuning.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write a file or folder at; renamed to `path` at the end.

    Raises:
        UserError: no space, no permission; `path` is then what it was before.
    """
    with _holder(path) as holder:
        yield holder / path.name
        put_at(holder / path.name, path)


@contextmanager
def filling(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` at the end, the file `last` after all.

    Raises:
        UserError: no space, no permission.
    """
    with _holder(folder / last) as holder:
        yield holder
        for path in sorted(holder.iterdir(), key=lambda path: path.name == last):
            put_at(path, folder / path.name)


@contextmanager
def _holder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, gone at the end; a failure to write is a UserError."""
    holder = None
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            yield holder
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a failure to write is a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says: disk full
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"could not write {path}: {reason}; free some space or choose another --out, "
            "what was there before is untouched"
        ) from error


_made: list[Path] = []  # folders that were made before anything is in them, see `empty_folders_go`


@contextmanager
def empty_folders_go() -> Iterator[None]:
    """Inside, what fails leaves no empty folder behind that `check_writable` made for it."""
    _made.clear()
    try:
        yield
    except BaseException:
        for folder in _made:
            with suppress(OSError):  # something is in it
                folder.rmdir()
        raise


def check_writable(folder: Path, advice: str = "choose another --out") -> None:
    """Refuse a folder that cannot be written to before long work would be in vain; it is made if
    need be.

    Raises:
        UserError: says why; with the `advice`.
    """
    try:
        _made.extend(path for path in (folder, *folder.parents) if not path.exists())
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; {advice}") from error


def put_at(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. A folder in the way steps aside: rename needs it gone.

    Files get the mode that the umask gives new ones: safetensors' are their owner's alone.
    """
    _give_usual_mode(temporary)
    if not path.is_dir():
        os.replace(temporary, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    os.rename(path, aside / "old")
    os.replace(temporary, path)
    shutil.rmtree(aside, ignore_errors=True)


def _give_usual_mode(path: Path) -> None:
    """Let `path`, a file or a folder of files, be readable by whom a new file there would be."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / "new"
        new.touch()
        mode = new.stat().st_mode
    for file in [path, *path.rglob("*")]:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file by way of a temporary name."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON by way of a temporary name."""
    write_text(path, json.dumps(value, indent=2) + "\n")


NAME = r"[\w-][\w.-]*"
HUB_ID = re.compile(f"{NAME}/{NAME}")


def check_folder(path: str, what: str) -> None:
    """Refuse what is neither here nor looks like an id of the hub.

    what: how messages call it.

    Raises:
        UserError: there is no such folder.
    """
    # The hub's oldest models and data, gpt2 say, have no owner.
    known = HUB_ID.fullmatch(path) or (what != "exits" and re.fullmatch(NAME, path))
    if not Path(path).exists() and not known:
        raise UserError(
            f"cannot read the {what} {path}: there is no such folder; a hub id is OWNER/NAME"
        )


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): mend it, or copy it again") from None


def read_object(path: Path, **kinds: Any) -> dict[str, Any]:
    """Parse a JSON file that holds an object; see `read_json` and `check_object`.

    Raises:
        UserError: see both.
    """
    found = read_json(path)
    check_object(found, str(path), **kinds)
    return found


def check_object(found: Any, where: str, **kinds: Any) -> None:
    """Refuse what is no JSON object, or one in which a value is of another kind than it has to be.

    where: it was found. kinds: by name, as ``int``, ``list[int]`` or ``int | None``; what may be
    None may be absent, too.

    Raises:
        UserError: names the first value.
    """
    if not isinstance(found, dict):
        raise UserError(f"{where} is damaged: it holds {found!r:.40}, no JSON object")
    lacking = [name for name, kind in kinds.items() if name not in found and not _is(None, kind)]
    if lacking:
        raise UserError(f"{where} is damaged: it lacks {', '.join(sorted(lacking))}")
    for name, kind in kinds.items():
        if not _is(found.get(name), kind):
            wanted = kind if get_args(kind) else kind.__name__
            raise UserError(
                f"{where} is damaged: {name} is {found[name]!r:.40}, it must be of type {wanted}"
            )


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return isinstance(value, list) and all(_is(one, item) for one in value)
    return type(value) is kind  # True is no number
