"""Writing files so that a crash, a full disk or a second writer never leaves half of one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ee_tuning.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write a file or folder at; renamed to `path` at the end.

    Raises:
        UserError: no space, no permission; `path` is then what it was before.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary = holder / path.name
        yield temporary
        _rename(temporary, path, holder)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says: disk full
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"could not write {path}: {reason}; free some space or choose another --out, "
            "what was there before is untouched"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary.parent, ignore_errors=True)


def _rename(temporary: Path, path: Path, holder: Path) -> None:
    """Put `temporary` at `path`. A folder in the way steps aside: rename needs it gone."""
    if path.is_dir():
        os.rename(path, holder / "old")
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file by way of a temporary name."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON by way of a temporary name."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
