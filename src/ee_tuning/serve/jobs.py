"""What a client waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ee_tuning.serve.choices import Choice, Delta
from ee_tuning.serve.errors import Refused


class Job:
    """The texts of one request, and what its client has not read of them yet.

    timer: gives it up when it has taken too long. given_up: nobody wants it any more.
    """

    timer: asyncio.TimerHandle

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = list(choices)
        self.submitted = time.perf_counter()
        self.given_up = False
        self.begun = False  # one of its texts has a slot
        self._news: asyncio.Queue[list[Delta] | Exception] = asyncio.Queue()
        self._open = {choice.index for choice in self.choices}

    @property
    def open(self) -> bool:
        """Whether there is more to come."""
        return bool(self._open)

    def give(self, news: list[Delta] | Exception) -> None:
        """What the engine has of it, or why there is no more."""
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
