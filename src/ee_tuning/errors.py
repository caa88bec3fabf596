"""Errors a user can cause. Everything else that goes wrong is a defect and keeps its traceback."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


class UserError(ValueError):
    """A mistake in what the user gave: one line saying what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2.
    """


class Notice(UserWarning):
    """What a user should know of something that goes on: one line, as for a mistake.

    The command line shows these warnings alone.
    """


class Interrupted(Exception):
    """A run was asked to stop and has saved its state. Exit status 130."""


class ProcessFailed(Exception):
    """One of a run's processes had to stop, perhaps because of another one. Exit status 1."""


@contextmanager
def mistakes_first() -> Iterator[Callable[[], None]]:
    """Inside, warnings wait until what is given is called, else for the end: a mistake that is
    found before has its line alone."""
    with ExitStack() as waiting:
        waiting.enter_context(_held_back())
        yield waiting.close


@contextmanager
def _held_back() -> Iterator[None]:
    """Inside, warnings wait for the end; they are dropped where something goes wrong."""
    with warnings.catch_warnings(record=True) as held:
        yield
    for one in held:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use in one of our own."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
