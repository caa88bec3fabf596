"""What a setting is: a field of a dataclass with its help text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from os.path import expanduser
from typing import Any


def option(default: Any, help: str, path: bool = False, fixed: bool = False) -> Any:
    """A dataclass field with its help text; lists get a fresh copy each.

    path: it names files or folders, or may. fixed: a run that goes on has to have the same.
    """
    metadata = {"help": help, "path": path, "fixed": fixed}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def changed(settings: Any, names: Iterable[str]) -> list[str]:
    """Those of `names` that are not as by default."""
    return [name for name in names if getattr(settings, name) != getattr(type(settings), name)]


class Settings:
    """What every command's settings are: paths may begin with ``~``."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.metadata["path"]:
                given = getattr(self, field.name)
                many = isinstance(given, list)
                setattr(self, field.name, [*map(expanduser, given)] if many else expanduser(given))
