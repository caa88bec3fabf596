"""What the server knows of its engine, which has a process of its own: texts go there, and what
becomes of them comes back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from ee_tuning.calibrate.audit import Audit
from ee_tuning.serve.choices import Choice
from ee_tuning.serve.errors import Refused
from ee_tuning.serve.jobs import Job, too_late
from ee_tuning.serve.messages import (
    Answer,
    Begun,
    Call,
    Cancel,
    Failed,
    Heard,
    Line,
    Settled,
    State,
    Stop,
    Told,
    Warm,
    Warned,
    receive,
    send,
)
from ee_tuning.serve.metrics import Metrics
from ee_tuning.serve.writer import Log, News, Writer

ALIVE = "warming up", "ready"


class Worker:
    """Has texts written by the engine at the other end of a connection.

    It runs in the thread of the clients, but for `ask` and a listener. state: ``warming up``,
    ``ready``, ``stopped``, or why the engine is dead.
    """

    def __init__(
        self,
        connection: Connection,
        slots: int,
        max_queue: int,
        seconds: float,
        metrics: Metrics,
        log: Log,
        audit: Audit | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """slots: of the engine. max_queue: jobs that may wait. seconds: a job may take. audit: of
        some texts. ready: called when all is warmed up."""
        self._connection, self._slots = connection, slots
        self.max_queue, self.seconds = max_queue, seconds
        self.metrics, self.log, self.audit, self.state = metrics, log, audit, "warming up"
        self._writer, self._ready = Writer(metrics, log, audit, self._cancel), ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[Job, Choice]] = {}  # by number
        self._live: dict[int, tuple[Job, Choice]] = {}
        self._asked: dict[int, Future[Any]] = {}
        self._calls = 0  # of these, that clients wait for
        self._speaks = threading.Lock()
        self._heard, self._takes = deque[Any](), False  # by the listener, and not taken in yet

    def start(self, measures: list[str], texts: bool) -> None:
        """Let the engine warm up for most requests; clients are told in the running loop.

        measures, texts: see `Engine.warm_up`.
        """
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        self._say(Warm(measures, texts))

    def halt(self) -> None:
        """Refuse what there is, and whatever comes."""
        self._end("stopped")

    def submit(self, job: Job) -> None:
        """Let its texts have slots in turn.

        Raises:
            Refused: too many wait already, or the engine is dead.
        """
        assert self._loop is not None
        self._refuse_if_full()
        job.timer = self._loop.call_later(self.seconds, self._late, job)
        for choice in job.choices:
            if self.audit is not None:
                choice.request.policy = self.audit.policy(choice.request.policy)
            choice.text.number = next(self._numbers)
            self._waiting[choice.text.number] = job, choice
            self._say(choice.text)

    def stop(self) -> None:
        """Halt, and let the engine go."""
        self.halt()
        self._say(Stop())

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module gives for the model and these arguments, between two steps.

        Raises:
            Refused: as for `submit`.
        """
        self._refuse_if_full()
        self._calls += 1
        try:
            asked = asyncio.wrap_future(self._ask(function, arguments))
            return await asyncio.wait_for(asked, self.seconds)
        except TimeoutError:
            raise too_late(self.seconds) from None
        finally:
            self._calls -= 1

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The same in any other thread, which waits; in the clients' as long as there are none."""
        asked = self._ask(function, arguments)
        while self._loop is None and not asked.done():  # nobody else listens yet
            self._take(receive(self._connection))
        try:
            return asked.result(self.seconds)
        except TimeoutError:
            raise too_late(self.seconds) from None

    def _ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Future[Any]:
        number, future = next(self._numbers), Future[Any]()
        self._asked[number] = future
        self._say(Call(number, function, arguments))
        if self.state not in ALIVE:
            self._unanswered()
        return future

    def give_up(self, job: Job, reason: str) -> None:
        """Nobody waits for it any more: its slots are free from the next step on.

        reason: for the metrics, which have each of its texts that did not end once.
        """
        job.timer.cancel()
        if not job.open or job.given_up:
            return
        job.given_up = True
        unended = [choice for choice in job.choices if choice.finish is None]
        self.metrics.gave_up(reason, len(unended))
        for choice in job.choices:
            self._cancel(choice)

    @property
    def waiting(self) -> int:
        """Texts that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that have one."""
        return len(self._live)

    def _refuse_if_full(self) -> None:
        if self.state not in ALIVE:
            raise Refused(f"the engine is {self.state}", status=503)
        jobs = {id(job) for job, _ in self._waiting.values() if not job.begun}
        free = max(0, self._slots - len(self._live))
        if max(0, len(jobs) - free) + self._calls >= self.max_queue:
            raise Refused(
                f"{self.max_queue} requests are waiting: try again later",
                status=429,
                code="queue_full",
                retry=min(60, 1 + len(jobs) // self._slots),
            )

    def _cancel(self, choice: Choice) -> None:
        """Let the engine know that there is no more of it to come."""
        number = choice.text.number
        found = self._live.pop(number, None) or self._waiting.pop(number, None)
        if found is not None:
            self._say(Cancel(number))

    def _late(self, job: Job) -> None:
        """It takes too long."""
        if job.open and not job.given_up:
            self.give_up(job, "deadline")
            job.give(too_late(self.seconds))

    # -- between here and the engine ---------------------------------------------------------------

    def _say(self, message: Any) -> None:
        try:
            with self._speaks:
                send(self._connection, message)
        except OSError:  # it is gone, as the listener is about to notice
            pass

    def _listen(self) -> None:
        """In a thread of its own: the engine must not wait until clients have been written to."""
        try:
            while True:
                self._hear(receive(self._connection))
        except (EOFError, OSError):
            self._hear(State("dead: its process has ended"))

    def _hear(self, message: Any) -> None:
        """Let the clients' thread take it, with what else has come by then."""
        assert self._loop is not None
        self._heard.append(message)
        if not self._takes:
            self._takes = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
                self._loop.call_soon_threadsafe(self._take_all)

    def _take_all(self) -> None:
        self._takes = False
        while self._heard:
            self._take(self._heard.popleft())

    def _write(self, settled: list[Settled]) -> None:
        """Give clients what they have more of."""
        news = [News(*self._live[one.number], one) for one in settled if one.number in self._live]
        for one in settled:
            if one.ended:
                self._live.pop(one.number, None)
        self._writer.write(news)

    def _take(self, message: Any) -> None:
        match message:
            case Told(settled, to_all):
                self._write(settled)
                if to_all:  # behind those that write it
                    assert self._loop is not None
                    self._loop.call_soon(self._say, Heard())
            case Begun(numbers, time):
                for number in numbers:
                    self._begin(number, time)
            case Failed(number, error):
                if number in self._live:
                    self._writer.write([News(*self._live.pop(number), error)])
            case Answer(number, found):
                future = self._asked.pop(number)
                if not future.set_running_or_notify_cancel():
                    return
                if isinstance(found, Exception):
                    future.set_exception(found)
                else:
                    future.set_result(found)
            case State("ready"):
                self.state = "ready"
                self._ready()
            case State(said):
                self._end(said)
            case Line(said):
                self.log(said)
            case Warned(said, category):
                warnings.warn(said, category, stacklevel=1)

    def _begin(self, number: int, time: float) -> None:
        """A text has a slot, if it is still waited for."""
        if (found := self._waiting.pop(number, None)) is not None:
            job, choice = self._live[number] = found
            job.begun, choice.started = True, time
            self.metrics.began(choice, job.submitted)

    def _end(self, state: str) -> None:
        """Nobody waits in vain."""
        if self.state not in ALIVE:
            return
        self.state = state
        refused = Refused(f"the engine is {state}", status=503)
        found = [*self._waiting.values(), *self._live.values()]
        for job in dict.fromkeys(job for job, _ in found):
            self.give_up(job, "error")
            job.give(refused)
        self._unanswered()

    def _unanswered(self) -> None:
        while self._asked:
            _, future = self._asked.popitem()
            if future.set_running_or_notify_cancel():
                future.set_exception(Refused(f"the engine is {self.state}", status=503))
