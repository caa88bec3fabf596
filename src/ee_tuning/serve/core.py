"""What owns the engine, in a process of its own: it admits texts, steps, and says what is settled.

So the engine has an interpreter to itself: reading requests and writing chunks, which may take as
long as steps do, go on beside it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import groupby
from multiprocessing.connection import Connection
from operator import itemgetter
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ee_tuning.decode import Engine, Request
from ee_tuning.decode.arguments import end_tokens
from ee_tuning.decode.engines import engines_of
from ee_tuning.decode.load import tokenizer_of
from ee_tuning.decode.settings import active_layers
from ee_tuning.devices import pick_device, pick_dtype
from ee_tuning.errors import UserError, first_line
from ee_tuning.exit_config import DRAFT, LOOKUP, ExitConfig
from ee_tuning.model import Network
from ee_tuning.passes.draws import ALL, NOTHING, TOP_P
from ee_tuning.serve.config import ServeConfig
from ee_tuning.serve.errors import explained, line_of
from ee_tuning.serve.messages import (
    Answer,
    Begun,
    Call,
    Cancel,
    Facts,
    Failed,
    Heard,
    Line,
    Settled,
    State,
    Stop,
    Text,
    Told,
    Warm,
    receive,
    send,
)
from ee_tuning.share import New, Saved, Share, load

CAPACITY = 4096  # tokens of a text, where the backbone's context has room for them
PROMPTS = 1024  # tokens of prompts read between two rounds: who is being answered waits for them
# What is compiled before the first request, of the ways to choose tokens: see `passes.draws`.
WARM = {"greedy": NOTHING, "temperature": ALL, "temperature and top_p": ALL | TOP_P}
TELL = 5.0  # seconds between two lines of the log on how far that is
FAILURES = 3  # steps in a row that fail: the engine is taken for dead
# Seconds from when clients have written what came to when they hear of the next, for each text that
# there is; from least to most: writing takes the server's process, and clients, a part of the time.
EACH, LEAST, MOST = 0.0025, 0.005, 0.04


class Core:
    """Feeds an engine with what comes over a connection, until the other side is gone."""

    def __init__(
        self,
        engine: Engine,
        model: Network,
        connection: Connection,
        ready: Callable[[], None],
    ) -> None:
        """ready: called when all is warmed up."""
        self.engine, self._model, self._connection = engine, model, connection
        self._ready = ready
        self._changed = threading.Condition()
        self._waiting: deque[Text] = deque()
        self._texts: dict[int, Text] = {}  # that have not ended
        self._calls: deque[Call] = deque()
        self._warm: Warm | None = None
        self._live: dict[Request, Text] = {}
        self._failures, self._stopping = 0, False
        self._read = 0  # tokens of prompts since the last round
        self._news: dict[Text, Settled] = {}  # that clients have not heard of
        self._next = 0.0  # when they will

    def run(self) -> None:
        """Warm up when told to, and decode."""
        listener = threading.Thread(target=self._listen, name="listener", daemon=True)
        listener.start()
        try:
            while self._wait():
                self._answer()
                if self._warm is not None:
                    self._warm_up(self._warm)
                elif self._waiting or self.engine.busy:
                    self._step()
        except Exception as error:
            self._explained(error)
            self._say(State(f"dead: {first_line(error)}"))
        listener.join()
        self._connection.close()

    # -- in a thread of its own --------------------------------------------------------------------

    def _listen(self) -> None:
        """At all times: who speaks must not wait for a step, in which this side may speak, too."""
        with suppress(EOFError, OSError):
            while not isinstance(message := receive(self._connection), Stop):
                self._take(message)
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def _take(self, message: Warm | Text | Cancel | Call | Heard) -> None:
        with self._changed:
            match message:
                case Text():
                    self._texts[message.number] = message
                    self._waiting.append(message)
                case Cancel():
                    # Else it has ended meanwhile.
                    if (text := self._texts.pop(message.number, None)) is not None:
                        self.engine.cancel(text.request)
                        if text in self._waiting:
                            self._waiting.remove(text)
                case Call():
                    self._calls.append(message)
                case Warm():
                    self._warm = message
                case Heard():
                    pause = min(max(EACH * len(self._texts), LEAST), MOST)
                    self._next = time.perf_counter() + pause
                    return
            self._changed.notify()

    # -- in the engine's ---------------------------------------------------------------------------

    def _say(self, message: Any) -> None:
        try:
            send(self._connection, message)
        except OSError:  # nobody listens any more, as the other thread is about to notice
            self._stopping = True

    def _wait(self) -> bool:
        """Wait for something to do; False: to stop."""
        with self._changed:
            while not (
                self._stopping or self._waiting or self._calls or self._warm or self.engine.busy
            ):
                self._changed.wait()
            return not self._stopping

    def _answer(self) -> None:
        """Call the function that was asked for first."""
        if self._calls:  # others wait for a step
            number, function, arguments = self._calls.popleft()
            try:
                found = function(self._model, *arguments)
            except UserError as error:
                found = error
            except Exception as error:
                found = self._explained(error)
            self._say(Answer(number, found))

    def _warm_up(self, warm: Warm) -> None:
        """Compile and capture what most requests ask for, where passes are compiled."""
        self._warm = None
        if self.engine.passes.compile:
            start = last = time.perf_counter()

            def told(done: int, of: int) -> None:
                nonlocal last
                while self._calls:  # no step waits for them
                    self._answer()
                now = time.perf_counter()
                if now - last >= TELL:
                    left = round((now - start) / done * (of - done))
                    line = {"event": "compiling", "done": done, "of": of, "seconds_left": left}
                    self._say(Line(line))
                    last = now

            self.engine.warm_up(warm.measures, [*WARM.values()], warm.texts, told)
            seconds = round(time.perf_counter() - start, 1)
            self._say(Line({"event": "compiled", "seconds": seconds, "sampling": [*WARM]}))
        self._ready()
        self._say(State("ready"))

    def _step(self) -> None:
        try:
            self._read = self._admit()
            events = self.engine.step()
            self._failures = 0
        except Exception as error:
            self._failed(error)
            return
        now = time.perf_counter()
        waited_for = list[Text]()  # whose client waits for a first token or the end
        failed = list[Failed]()
        for request, own in groupby(events, key=itemgetter(0)):
            text = self._live.get(request)
            if text is None or request.cancelled:
                continue
            tokens = [token for _, token in own if token is not None]
            begins, ends = not text.written, False
            if tokens:
                settled = text.settle(tokens, now)
                ends, before = settled.ended, self._news.get(text)
                self._news[text] = settled if before is None else before.and_then(settled)
            if request.error is not None and not ends:
                failed.append(Failed(text.number, self._explained(request.error)))
                ends = True
            if ends:
                self.engine.cancel(request)  # if it ends before the engine knows
                self._forget(text)
            if begins or ends:
                waited_for.append(text)
        for request in [request for request in self._live if request.cancelled]:
            self._forget(self._live[request])
        self._hand_on(waited_for, now)
        for one in failed:
            self._say(one)

    def _forget(self, text: Text) -> None:
        del self._live[text.request]
        self._texts.pop(text.number, None)

    def _hand_on(self, waited_for: Collection[Text], now: float) -> None:
        """Let clients hear of what was settled: all of them, if the last that they heard of is
        written; else those who wait for it. So writing takes no time from small steps, and where
        there are many clients each hears of more at a time."""
        if to_all := now >= self._next and bool(self._news):
            waited_for, self._next = [*self._news], math.inf
        found = [self._news.pop(text) for text in waited_for if text in self._news]
        if found:
            self._say(Told(found, to_all))

    def _admit(self) -> int:
        """Hand the next texts to the engine, if there are slots, and not too much to read since the
        last round. Gives how much there is now; 0 if there will be a round.

        Where prompts are read one after another, whose was read hears of it before the next one is.
        """
        passes, tokens = self.engine.passes, 0
        live = sum(not request.cancelled for request in self.engine.requests)
        if live and self._read >= PROMPTS:
            return 0
        together = passes.compile or passes.beside
        free = passes.slots - live if together else min(1, passes.slots - live)
        begun, refused = list[int](), list[tuple[int, Exception]]()
        with self._changed:
            while self._waiting and free and self._read + tokens < PROMPTS:
                text = self._waiting.popleft()
                begun.append(text.number)
                try:
                    self.engine.submit(text.request)
                except Exception as error:
                    self._texts.pop(text.number, None)
                    refused.append((text.number, error))
                    continue
                self._live[text.request] = text
                free, tokens = free - 1, tokens + len(text.request.ids)
        if begun:
            self._say(Begun(begun, time.perf_counter()))
        for number, reason in refused:
            self._say(Failed(number, self._explained(reason)))
        return self._read + tokens if tokens else 0

    def _failed(self, error: Exception) -> None:
        """A step failed: with it all that was in progress. Others may go on, if the device does."""
        self._failures += 1
        explained = self._explained(error)
        self._hand_on([*self._news], time.perf_counter())
        for text in [*self._live.values()]:
            self._say(Failed(text.number, explained))
            self._forget(text)
        self.engine.clear()
        if self._failures >= FAILURES:
            raise error
        if self.engine.passes.device.type == "cuda":
            torch.cuda.synchronize()

    def _explained(self, error: Exception) -> Exception:
        if line := line_of(error):
            self._say(Line(line))
        return explained(error)


def run(
    config: ServeConfig,
    connection: Connection,
    ready: Callable[[], None],
) -> None:
    """Load the model, tell of it, and decode; a mistake in the settings is told in its place.

    ready: see `Core`.
    """
    try:
        model, tokenizer, exit_layers = load_model(config)
        capacity, backbone = room(config.capacity, model), model.backbone
        with engines_of(model).lend(
            model,
            [LOOKUP, *exit_layers],  # any request may ask for it
            slots=config.slots,
            capacity=capacity,
            max_pending=most_pending(config, model),
            compile=config.compiled(),
        ) as engine:
            assert isinstance(engine, Engine)
            facts = Facts(
                backbone.model.name_or_path, backbone.config.vocab_size, backbone.num_layers,
                exit_layers, sorted(end_tokens(backbone.model, tokenizer)), capacity,
                model.calibration,
            )  # fmt: skip
            send(connection, facts)
            Core(engine, model, connection, ready).run()
    except UserError as error:
        send(connection, error)


def load_model(
    config: ServeConfig,
) -> tuple[Network, PreTrainedTokenizerBase, Sequence[int]]:
    """The model, its tokenizer, and where its exits are."""
    device = pick_device(config.device)
    share = Share(dtype=pick_dtype(config.precision, device), device=str(device))
    trust, layers = config.trust_remote_code, list[int]()
    if config.exits:
        model = load(Saved(config.exits, config.model or None, trust), share, Network)
        layers = [*active_layers(model, None), *([DRAFT] if model.draft else [])]
    else:
        # A network has an exit: this one has no weights, and is not used.
        none = ExitConfig("1/1", "embedding", head="shared")
        model = load(New(config.model, none, trust), share, Network)
    return model.eval(), tokenizer_of(model, config.exits, trust), layers


def most_pending(config: ServeConfig, model: Network) -> int:
    """Of any request: calibrated thresholds have their own."""
    found = model.calibration
    return max(config.max_pending, found.max_pending if found is not None else 0)


def room(capacity: int, model: Network) -> int:
    """Tokens that a text may have with its prompt.

    Raises:
        UserError: more than the backbone was made for.
    """
    longest = model.backbone.longest_text
    if not capacity:
        return min(CAPACITY, longest or CAPACITY)
    if longest and capacity > longest:
        raise UserError(
            f"capacity is {capacity}, the backbone's context {longest}: give that or less"
        )
    return capacity
