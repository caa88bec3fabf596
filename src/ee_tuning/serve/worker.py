"""The thread that owns the engine: it admits texts, steps, and hands out what is settled."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch

from ee_tuning.calibrate.audit import Audit
from ee_tuning.decode import Engine, Request
from ee_tuning.errors import first_line
from ee_tuning.passes.draws import ALL, NOTHING, TOP_P
from ee_tuning.serve.choices import Choice
from ee_tuning.serve.errors import Refused
from ee_tuning.serve.jobs import Job, answer, fail, too_late
from ee_tuning.serve.metrics import Metrics
from ee_tuning.serve.writer import Log, News, Writer

PROMPTS = 1024  # tokens of prompts read between two rounds: who is being answered waits for them
# What is compiled before the first request, of the ways to choose tokens: see `passes.draws`.
WARM = {"greedy": NOTHING, "temperature": ALL, "temperature and top_p": ALL | TOP_P}
TELL = 5.0  # seconds between two lines of the log on how far that is
FAILURES = 3  # steps in a row that fail: the engine is taken for dead

EVERY = 0.005  # seconds from when clients have written what came to when they hear of the next


class Worker:
    """Feeds an engine, in a thread of its own.

    state: ``warming up``, ``ready``, ``stopped``, or why the engine is dead.
    """

    def __init__(
        self,
        engine: Engine,
        max_queue: int,
        seconds: float,
        metrics: Metrics,
        log: Log,
        audit: Audit | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """max_queue: jobs that may wait. seconds: a job may take. audit: of some texts. ready:
        called in the engine's thread when all is warmed up."""
        self.engine, self.max_queue, self.seconds = engine, max_queue, seconds
        self.metrics, self.log, self.audit, self.state = metrics, log, audit, "warming up"
        self._writer, self._ready = Writer(metrics, log, audit, engine.cancel), ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Job, Choice]] = deque()
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._live: dict[Request, tuple[Job, Choice]] = {}
        self._failures, self._stopping = 0, False
        self._read = 0  # tokens of prompts since the last round
        self._news: list[News] = []  # that clients have not heard of
        self._next = 0.0  # when they will

    # -- in the thread of the clients --------------------------------------------------------------

    def start(self, measures: list[str], texts: bool) -> None:
        """Warm up for most requests, and begin; clients are told in the running loop.

        measures, texts: see `Engine.warm_up`.
        """
        self._loop, self._warms_for = asyncio.get_running_loop(), (measures, texts)
        self._thread.start()

    def halt(self) -> None:
        """Refuse what there is, from the next step on, and whatever comes."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self) -> None:
        """Halt, and end the thread."""
        self.halt()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)

    def submit(self, job: Job) -> None:
        """Let its texts have slots in turn.

        Raises:
            Refused: too many wait already, or the engine is dead.
        """
        with self._changed:
            self._refuse_if_full()
            self._waiting += [(job, choice) for choice in job.choices]
            self._changed.notify()

    async def call(self, function: Callable[[], Any]) -> Any:
        """What a function that uses the model gives, called between two steps.

        Raises:
            Refused: as for `submit`.
        """
        assert self._loop is not None
        future = self._loop.create_future()
        with self._changed:
            self._refuse_if_full()
            self._calls.append((function, future))
            self._changed.notify()
        try:
            return await asyncio.wait_for(future, self.seconds)
        except asyncio.TimeoutError:
            raise too_late(self.seconds) from None

    def give_up(self, job: Job, reason: str) -> None:
        """Nobody waits for it any more: its slots are free from the next step on.

        reason: for the metrics, which have each of its texts that did not end once.
        """
        with self._changed:
            if not job.open or job.given_up:
                return
            job.given_up = True
            unended = [choice for choice in job.choices if choice.finish is None]
            self.metrics.gave_up(reason, len(unended))
            for choice in job.choices:
                self.engine.cancel(choice.request)
            if any(other is job for other, _ in self._waiting):
                self._waiting = deque(one for one in self._waiting if one[0] is not job)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Texts that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that have one."""
        return len(self._live)

    def _hand_out(self, news: list[News], all: bool) -> None:
        """Make text of what steps have settled, while the next one computes.

        all: there was no more.
        """
        self._writer.write(news)
        if all:
            assert self._loop is not None
            self._loop.call_soon(self._handed_out)  # behind those that write it

    def _handed_out(self) -> None:
        self._next = time.perf_counter() + EVERY

    def _refuse_if_full(self) -> None:
        if self.state not in ("warming up", "ready"):
            raise Refused(f"the engine is {self.state}", status=503)
        jobs = {id(job) for job, _ in self._waiting if not job.begun}
        if len(jobs) + len(self._calls) >= self.max_queue:
            raise Refused(
                f"{self.max_queue} requests are waiting: try again later",
                status=429,
                code="queue_full",
                retry=min(60, 1 + len(jobs) // self.engine.passes.slots),
            )

    # -- in the engine's thread --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._warm_up()
            self._ready()
            self.state = "ready"
            while self._wait():
                self._call()
                self._step()
        except Exception as error:
            self._die(error)
        self._end("stopped" if self._stopping else self.state)

    def _warm_up(self) -> None:
        """Compile and capture what most requests ask for, where passes are compiled."""
        if not self.engine.passes.compile:
            return
        start = last = time.perf_counter()

        def told(done: int, of: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last >= TELL:
                left = round((now - start) / done * (of - done))
                self.log({"event": "compiling", "done": done, "of": of, "seconds_left": left})
                last = now

        measures, texts = self._warms_for
        self.engine.warm_up(measures, [*WARM.values()], texts, told)
        seconds = round(time.perf_counter() - start, 1)
        self.log({"event": "compiled", "seconds": seconds, "sampling": [*WARM]})

    def _wait(self) -> bool:
        """Wait for something to do; False: to stop."""
        with self._changed:
            while not (self._stopping or self._waiting or self._calls or self.engine.busy):
                self._changed.wait()
            return not self._stopping

    def _call(self) -> None:
        """Run one function that was asked for."""
        with self._changed:
            if not self._calls:
                return
            function, future = self._calls.popleft()
        if future.cancelled():
            return
        try:
            with self.engine.turn:
                found = function()
        except Exception as error:
            self._writer.log_error(error)
            self._tell(fail, future, error)
        else:
            self._tell(answer, future, found)

    def _step(self) -> None:
        try:
            self._read = self._admit()
            events = self.engine.step()
            self._failures = 0
        except Exception as error:
            self._failed(error)
            return
        news, now = self._news, time.perf_counter()
        waited_for: set[Choice] = set()  # whose client waits for a first token or the end
        for request, own in groupby(events, key=itemgetter(0)):
            found = self._live.get(request)
            if found is None or request.cancelled:
                continue
            job, choice = found
            tokens = [token for _, token in own if token is not None]
            begins, ends = not choice.written, False
            if tokens:
                settled, ends = choice.settle(tokens, now)
                news.append(News(job, choice, settled))
            failed = request.error is not None and not ends
            if failed:
                assert request.error is not None
                news.append(News(job, choice, request.error))
            if begins or ends or failed:
                waited_for.add(choice)
            if ends:
                self.engine.cancel(request)  # if it ends before the engine knows
            if ends or failed:
                del self._live[request]
        self._hand_on(waited_for, now)
        self._look_at_the_clock(now)

    def _hand_on(self, waited_for: set[Choice], now: float) -> None:
        """Let clients hear of what was settled: all of them, if the last that they heard of is
        written and seen; else those who wait for it. So writing takes no time from small steps."""
        if all := now >= self._next:
            found, self._news, self._next = self._news, [], math.inf
        else:
            found = [one for one in self._news if one.choice in waited_for]
            self._news = [one for one in self._news if one.choice not in waited_for]
        if found or all:
            self._tell(self._hand_out, found, all)

    def _admit(self) -> int:
        """Hand the next texts to the engine, if there are slots, and not too much to read since the
        last round. Gives how much there is now; 0 if there will be a round.

        Where prompts are read one after another, whose was read hears of it before the next one is.
        """
        passes, tokens = self.engine.passes, 0
        live = sum(not row.request.cancelled for row in self.engine.sequences.live)
        if live and self._read >= PROMPTS:
            return 0
        together = passes.compile or passes.beside
        free = passes.slots - live if together else min(1, passes.slots - live)
        with self._changed:
            while self._waiting and free and self._read + tokens < PROMPTS:
                job, choice = self._waiting.popleft()
                if self.audit is not None:
                    choice.request.policy = self.audit.policy(choice.request.policy)
                self.engine.submit(choice.request)
                job.begun, choice.started = True, time.perf_counter()
                self._live[choice.request] = job, choice
                self.metrics.began(choice, job.submitted)
                free, tokens = free - 1, tokens + len(choice.request.ids)
        return self._read + tokens if tokens else 0

    def _look_at_the_clock(self, now: float) -> None:
        """Give up what takes too long, and forget what was given up."""
        for request, (job, _) in list(self._live.items()):
            if job.deadline < now and not job.given_up:
                self._hand_on({*job.choices}, now)
                self.give_up(job, "deadline")
                self._tell(job.give, too_late(self.seconds))
            if request.cancelled:
                del self._live[request]
        with self._changed:
            late = [job for job, _ in self._waiting if job.deadline < now]
        for job in dict.fromkeys(late):
            self.give_up(job, "deadline")
            self._tell(job.give, too_late(self.seconds))

    def _failed(self, error: Exception) -> None:
        """A step failed: with it all that was in progress. Others may go on, if the device does."""
        self._failures += 1
        self._fail_live(error)
        self.engine.clear()
        if self._failures >= FAILURES:
            raise error
        if self.engine.passes.device.type == "cuda":
            torch.cuda.synchronize()

    def _die(self, error: Exception) -> None:
        """There is nothing more to be had of the engine."""
        self.state = f"dead: {first_line(error)}"
        self._fail_live(error)

    def _fail_live(self, error: Exception) -> None:
        explained = self._writer.explained(error)
        self._hand_on({choice for _, choice in self._live.values()}, 0)
        for job in dict.fromkeys(job for job, _ in self._live.values()):
            self.give_up(job, "error")
            self._tell(job.give, explained)
        self._live.clear()

    def _end(self, state: str) -> None:
        """Nobody waits in vain."""
        self.state = state
        refused = Refused(f"the engine is {state}", status=503)
        with self._changed:
            jobs = [job for job, _ in (*self._waiting, *self._live.values())]
            calls = [future for _, future in self._calls]
            self._waiting.clear()
            self._calls.clear()
        for job in dict.fromkeys(jobs):
            self._tell(job.give, refused)
        for future in calls:
            self._tell(fail, future, refused)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the thread of the clients."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
