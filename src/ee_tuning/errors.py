"""Errors a user can cause. Everything else that goes wrong is a defect and keeps its traceback."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: one line saying what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2.
    """


class Notice(UserWarning):
    """What a user should know of something that goes on: one line, as for a mistake.

    The command line shows these warnings alone.
    """


class SecurityNotice(Notice):
    """One of what cannot be undone, as code that is run: it never waits, see `mistakes_first`."""


class Interrupted(Exception):
    """A run was asked to stop and has saved its state. Exit status 130."""


class ProcessFailed(Exception):
    """One of a run's processes had to stop, perhaps because of another one. Exit status 1."""


_waiting: list[Callable[[], None]] | None = None  # each shows a notice; None: none has to wait


@contextmanager
def mistakes_first() -> Iterator[None]:
    """Inside, notices wait for `all_checked`, else for the end: a mistake that is found before has
    its line alone."""
    global _waiting
    show, _waiting = warnings.showwarning, []

    def show_later(
        message: Warning | str, category: type[Warning], *where: Any, **named: Any
    ) -> None:
        one = partial(show, message, category, *where, **named)
        if _waiting is not None and category is Notice:
            _waiting.append(one)
        else:
            one()

    warnings.showwarning = show_later
    try:
        yield
        all_checked()
    finally:
        warnings.showwarning, _waiting = show, None


def all_checked() -> None:
    """Nothing is left that could be refused: show the notices that wait, and later ones at once."""
    global _waiting
    waiting, _waiting = _waiting or [], None
    for one in waiting:
        one()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use in one of our own."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
