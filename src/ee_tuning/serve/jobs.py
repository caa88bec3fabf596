"""What a client waits for, between the thread that serves it and the one that decodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from ee_tuning.serve.choices import Choice, Delta
from ee_tuning.serve.errors import Refused


class Job:
    """The texts of one request, and what its client has not read of them yet.

    deadline: when it is given up, by `time.perf_counter`. given_up: nobody wants it any more.
    """

    def __init__(self, choices: Sequence[Choice], seconds: float) -> None:
        """seconds: it may take."""
        self.choices = list(choices)
        self.submitted = time.perf_counter()
        self.deadline = self.submitted + seconds
        self.given_up = False
        self.begun = False  # one of its texts has a slot
        self._news: asyncio.Queue[list[Delta] | Exception] = asyncio.Queue()
        self._open = {choice.index for choice in self.choices}

    @property
    def open(self) -> bool:
        """Whether there is more to come."""
        return bool(self._open)

    def give(self, news: list[Delta] | Exception) -> None:
        """In the thread of its client: what the engine has of it, or why there is no more."""
        self._news.put_nowait(news)

    async def take(self) -> list[Delta]:
        """All that has come since, at least something.

        Raises:
            Exception: why there is no more.
        """
        found: list[Delta] = []
        while not found or not self._news.empty():
            news = await self._news.get()
            if isinstance(news, Exception):
                raise news
            found += news
        for delta in found:
            if delta.error is not None:
                raise delta.error
            if delta.finish is not None:
                self._open.discard(delta.index)
        return found


class Gone(Exception):
    """The client has left."""


def too_late(seconds: float) -> Refused:
    """A request has taken longer than the server lets it."""
    message = f"the request took longer than {seconds:g} seconds: ask for fewer tokens"
    return Refused(message, status=504, code="deadline_exceeded")


def answer(future: asyncio.Future[Any], found: Any) -> None:
    """Give what was called for, if it is still waited for."""
    if not future.done():
        future.set_result(found)


def fail(future: asyncio.Future[Any], error: Exception) -> None:
    """Say why it cannot be had, if it is still waited for."""
    if not future.done():
        future.set_exception(error)
