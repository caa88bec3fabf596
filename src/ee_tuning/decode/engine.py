"""Which sequence goes through which segment next.

=========  ===========================================================================
slot       where an engine keeps one sequence: its K/V, what it is about to compute
row        the sequence in a slot, as far as it has come
segment    the layers from one exit to the next
door       where rows stand that a segment has tokens of to compute
window     the tokens of a row that a segment computes in one pass
ring       where hidden states wait before a segment until it computes them
place      where the K/V of a pass are written; reach: up to where its tokens look back
pending    tokens that left at an exit since the last one that went to the end
draft      a token that left, if the end is still to verify it
settled    what nothing takes back any more
pace       how many drafts a round has
round      from one settling of tokens to the next
look       rounds at full depth of which the host hears at a time
lane       where prompts are read while other passes run
=========  ===========================================================================

A sequence stands at the *door* of a segment with the tokens that the segment has not computed yet.
The engine opens one door at a time, for all that stand there: the one that promises most tokens a
layer. So sequences whose tokens leave early go on, at a few layers a token, while most of them do;
then those that need depth go deep together, and what their tokens left behind is computed in the
same pass: KV recomputation (arXiv 2312.04916) of the missing layers only. All else follows: full
depth is decoding in which no token leaves, a fixed depth a model that ends at an exit, and in
self-speculation what left is a draft until the next token that goes to the end has verified it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch

from ee_tuning.config import Leaving
from ee_tuning.costs import draft_cost
from ee_tuning.decode.ahead import Ahead, cuts_beside
from ee_tuning.decode.drafts import FirstTokens, next_round, underway
from ee_tuning.decode.pace import Pace
from ee_tuning.decode.relay import Relay
from ee_tuning.decode.sampling import Token
from ee_tuning.decode.sequences import Request, Row, Sequences
from ee_tuning.decode.settings import Policy
from ee_tuning.decode.straight import Several
from ee_tuning.decode.together import Together
from ee_tuning.devices import wait_for
from ee_tuning.errors import UserError
from ee_tuning.exit_config import LOOKUP
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.passes.draws import NOTHING
from ee_tuning.passes.graphs import Lane
from ee_tuning.passes.noise import Seeds
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.warm import to_warm

# A settled token of a request; None where it failed, for the reason `request.error`.
Event = tuple[Request, Token | None]


class Engine:
    """Decodes many sequences at a time.

    It is fed by `submit` and driven by `step`, from one thread; `stream` does both. `submit` and
    `cancel` may be called from others meanwhile.
    """

    def __init__(
        self,
        model: Network,
        exit_layers: Sequence[int],
        *,
        slots: int = 1,
        capacity: int,
        max_pending: int = Leaving.max_pending,
        compile: bool = False,
        drafts: bool = False,
        turn: AbstractContextManager[Any] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """exit_layers: the exits that any request may use. slots: sequences at a time.
        capacity: tokens of a sequence at most. max_pending: the largest of any request.
        compile: see `ee_tuning.passes.passes.Passes`. drafts: some request has drafts that the end
        verifies. turn: held in each step, where other threads use the model, too. mesh: of stages
        that work in turns; see `Relay`.

        Raises:
            UserError: the K/V do not fit into the memory that is free.
        """
        longest = min(max_pending + 1, capacity)
        stage = None if mesh is None else model.stage
        # Of texts beside each other, and of drafts, the host asks: to it each cut is one more pass.
        alone = slots == 1 and not drafts and mesh is None
        cuts = cuts_beside(model, exit_layers) if alone else []
        self._own = Passes(
            model, exit_layers, slots=slots, capacity=capacity, longest=longest, compile=compile,
            stage=stage, cuts=cuts,
        )  # fmt: skip
        self.passes = self._own if mesh is None else cast(Any, Relay(self._own, mesh))
        apart = mesh is None and self._own.reads_apart
        self._lane = Lane(self._own.device) if apart else None  # of prompts
        self.sequences = Sequences(self.passes, exit_layers, max_pending)
        one = len(self.sequences.stops) == 1
        self.several = Several(self.sequences) if one else None
        self.ahead: Ahead | None = None
        self.together: Together | None = None
        if self.passes.branch:
            self.ahead = Ahead(self.passes, self.sequences.stops)
            # With --tp each draft is told by the first process, between passes.
            chained = self._own.chains is not None and self._own.group is None
            if chained and slots > 1 and self._own.most > 1:
                self.together = Together(self.sequences)
        self.turn = nullcontext() if turn is None else turn
        self.streams = False  # whether a stream is in progress
        exits = [layer for layer in exit_layers if layer != LOOKUP]
        gather = None if mesh is None else mesh.gather_on_host
        self._draft_costs = {layer: draft_cost(model, layer, gather) for layer in exits}
        self._waiting: deque[Request] = deque()
        self._reading: FirstTokens | None = None
        self._seeds: Seeds | None = None  # while there is something to do

    @property
    def busy(self) -> bool:
        """Whether there is something to do: a sequence in a slot, or one that waits for it."""
        return bool(self._waiting or self.sequences.live)

    @property
    def requests(self) -> list[Request]:
        """What was submitted and has not ended: in slots, then what waits for them."""
        return [*(row.request for row in self.sequences.live), *self._waiting]

    @torch.inference_mode()
    def warm_up(
        self,
        measures: Sequence[str] = (Leaving.measure,),
        samples: Sequence[int] = (NOTHING,),
        texts: bool = True,
        told: Callable[[int, int], None] | None = None,
        drafts: bool = True,
    ) -> None:
        """Compile and capture everything now.

        samples: kinds of what texts do to choose their tokens, see `ee_tuning.passes.draws`. texts:
        whether texts draft, where they may. told: how much of it is done, and of how much. drafts:
        whether exits at layers draft.
        """
        assert not self.busy
        texts = texts and self._own.texts
        jobs = to_warm(self._own, measures, samples, texts)
        if self.ahead is not None:
            jobs += self.ahead.to_warm(self.sequences.max_pending, measures, samples, drafts, texts)
        if self.together is not None:
            jobs += self.together.to_warm(measures, samples)
        for number, job in enumerate(jobs, 1):
            job()
            if told is not None:
                told(number, len(jobs))
        wait_for(self.passes.device)

    def check(self, request: Request, capacity: int | None = None) -> None:
        """See `Sequences.check`."""
        self.sequences.check(request, capacity)

    def submit(self, request: Request) -> None:
        """Let a request have the next slot that is free.

        Raises:
            UserError: it does not fit this engine. The others go on.
        """
        self.check(request)
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Give a request up: there are no more tokens of it."""
        request.cancelled = True

    def clear(self) -> None:
        """Give up everything, in progress or not."""
        self.sequences.clear()
        self._waiting.clear()
        self._reading = self._seeds = None
        if self._lane is not None:
            self._lane.wait()

    def step(self) -> list[Event]:
        """The events of one round: prompts, if there are new ones for free slots, or tokens.

        Never waits for a request; gives nothing if there is none.
        """
        with self.turn:
            return self._round()

    def _round(self) -> list[Event]:
        for row in self.sequences.live:
            if row.request.cancelled:
                self.sequences.free(row)
        live, ways = self.sequences.live, (self.several, self.ahead, self.together)
        waits = bool(self._waiting and self.sequences.free_slots) and self._lane is None
        may = self._reading is None and (self._lane is not None or not underway(live, *ways))
        if may and (new := self._admit()):
            self._reading = FirstTokens(self.sequences, new, self._lane)
        if (reading := self._reading) is not None:
            live = [row for row in live if row not in reading.rows]
        joins = reading is not None and (reading.over or not live)
        # What lets several go on lets others come; who was alone is looked at first.
        if reading is not None and joins and not underway(live, None, self.ahead):
            settled, self._reading = reading.settled(), None
        else:
            behind = not (waits or joins)
            settled = next_round(self.sequences, live, *ways, behind=behind) if live else []
        events = [event for row, tokens in settled for event in self._settle(row, tokens)]
        if not self.busy and not self.streams:
            self._seeds = None
        return events

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Token]]:
        """Every token of every request, as soon as it is settled.

        The next request is taken when a slot is free for it. Ending the iteration early gives up
        what is in progress.

        Raises:
            UserError: a request does not fit this engine, or cannot be had: once what is in
                progress has ended; or what a request's processors raise, at once.
        """
        assert not self.streams, "an engine runs one stream at a time"
        self.streams, self._seeds = True, Seeds()
        waiting, mistake = iter(requests), None
        try:
            while True:
                if mistake is None:
                    mistake = self._fill(waiting)
                if not self.busy:
                    break
                for request, token in self.step():
                    if token is None:
                        assert request.error is not None
                        raise request.error
                    if not request.cancelled:
                        yield request, token
            if mistake is not None:
                raise mistake
        finally:
            self.streams = False
            self.clear()

    def _fill(self, waiting: Iterator[Request]) -> UserError | None:
        """Submit a request for each free slot; the mistake in one, after which there is no more."""
        try:
            for _ in self.sequences.free_slots[len(self._waiting) :]:
                request = next(waiting, None)
                if request is None:
                    break
                self.submit(request)
        except UserError as mistake:
            return mistake
        return None

    def _admit(self) -> list[Row]:
        """A row for the next request in each free slot; for few of them beside others that go on:
        who has been read joins these, and who comes later is not waited for."""
        new, beside = list[Row](), self._lane is not None and self.sequences.live
        most = self._own.sizes.together if beside else self.passes.slots
        for slot in self.sequences.free_slots[:most] if self._waiting else ():
            while self._waiting and self._waiting[0].cancelled:
                self._waiting.popleft()
            if not self._waiting:
                break
            request = self._waiting.popleft()
            self._seeds = self._seeds or Seeds()
            row = self.sequences.enter(request, slot, self._seeds)
            policy = row.policy
            if policy.verifies and not policy.steady:
                row.pace = self._pace(policy)
                row.limit = row.limit if row.pace is not None else 0
            new.append(row)
        return new

    def _pace(self, policy: Policy) -> Pace | None:
        """Of the drafts that exits make; None, where the text alone may draft."""
        exits = [layer for layer in policy.exit_layers if layer != LOOKUP]
        if not exits:
            return None
        # A captured chain has as many drafts as it may, and the end is looked for after it.
        stops = policy.bar is None or not self.passes.compile
        return Pace(policy.max_pending, self._draft_costs[min(exits)], stops)

    def _settle(self, row: Row, tokens: list[Token]) -> Iterator[Event]:
        """Hand out the last tokens of row.ids, until one of them ends the text."""
        request = row.request
        try:
            for length, token in enumerate(tokens, start=len(row.ids) - len(tokens) + 1):
                if request.cancelled:
                    return
                stops = request.stops(row.ids, length)
                token.ends = stops or length >= request.max_length
                if token.ends:
                    self.sequences.free(row)
                    request.finished = True
                yield request, token
                if token.ends:
                    return
        except Exception as error:  # of what the request brought with it: it ends alone
            request.error = error
        if request.error is not None:
            self.sequences.free(row)
            request.finished = True
            yield request, None
