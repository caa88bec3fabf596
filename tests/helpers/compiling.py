"""What torch.compile would be asked for, without asking it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def kinds_met(monkeypatch: Any) -> set[Any]:
    """Of functions that are compiled for each size of its own, those that were called so far, and
    with what: a new one would be compiled. Nothing is."""
    met: set[Any] = set()

    def compile(
        function: Any = None, *, dynamic: bool | None = None, **_: Any
    ) -> Callable[..., Any]:
        if dynamic is not False:
            return function

        @wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            met.add((function.__qualname__, _kind(given), _kind(tuple(named.values()))))
            return function(*given, **named)

        return call

    monkeypatch.setattr(torch, "compile", compile)
    return met


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    return value if isinstance(value, int | float | str | None) else type(value)
