"""What a setting is: a field of a dataclass with its help text."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from numbers import Real
from os.path import expanduser
from typing import Any

from ee_tuning.errors import Notice, UserError


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


def warn_of_fewer(name: str, asked: int, found: int) -> None:
    """Say that the data has less than the setting `name` asks for, where it has."""
    if found < asked:
        text = f"{name} is {asked:,}, and the data has {found:,}: these are taken"
        warnings.warn(text, Notice, stacklevel=2)


def check_finite(name: str, value: Any) -> None:
    """Refuse a number, or one in a list or mapping, that is none to compute with.

    Raises:
        UserError: it is nan or infinite.
    """
    values = value.values() if isinstance(value, Mapping) else value
    for one in values if isinstance(value, list | tuple | Mapping) else [value]:
        if isinstance(one, Real) and not isinstance(one, int) and not math.isfinite(one):
            raise UserError(f"{name} is {one}: it must be a finite number")


class Settings:
    """What every command's settings are: paths may begin with ``~``, and numbers are finite."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            given = getattr(self, field.name)
            check_finite(field.name, given)
            if field.metadata["path"]:
                many = isinstance(given, list)
                setattr(self, field.name, [*map(expanduser, given)] if many else expanduser(given))
