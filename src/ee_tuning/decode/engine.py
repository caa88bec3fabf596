"""Which sequence goes through which segment next.

A sequence stands at the *door* of a segment with the tokens that the segment has not computed yet.
The engine always opens the shallowest door at which anyone stands, for all that stand there. So
sequences whose tokens leave early go on drafting, at a few layers a token, until each of them needs
depth; then they go deep together, and what a token left behind is computed in the same pass: KV
recomputation (arXiv 2312.04916) of the missing layers only. Nothing else is needed: full depth is
decoding in which no token leaves, a fixed depth a model that ends at an exit, and in
self-speculation what left is a draft until the next token that goes to the end has verified it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from typing import TYPE_CHECKING

from ee_tuning.costs import draft_cost
from ee_tuning.decode.passes import Passes, Predictions, Wanted, Window
from ee_tuning.decode.policy import Policy
from ee_tuning.decode.speculative import Chooser, Generators, Pace, Token
from ee_tuning.errors import UserError

if TYPE_CHECKING:
    from ee_tuning.model import EarlyExitModel


def _never(ids: Sequence[int]) -> bool:
    return False


@dataclass(eq=False)
class Request:
    """A prompt and how to go on from it.

    max_length: tokens with the prompt's, at most. stops: whether what is written ends the text.
    Set `cancelled` to give it up; `finished` says that the last token has come.
    """

    ids: list[int]
    policy: Policy
    max_length: int
    chooser: Chooser = field(default_factory=Chooser)
    stops: Callable[[Sequence[int]], bool] = _never
    cancelled: bool = False
    finished: bool = False


class _Row:
    """A sequence in progress, in its slot.

    ids: prompt, settled tokens, drafts. done: per segment up to the `last`, how many of them it
    has computed. door: the segment it stands before. pending: tokens that left since the last one
    that went to the end; limit: how many may; pace: sets it, if they are drafts. asks: what follows
    the newest token is not known yet.
    """

    def __init__(self, request: Request, slot: int, last: int) -> None:
        self.request, self.slot, self.last = request, slot, last
        self.policy = request.policy
        self.ids = list(request.ids)
        self.done = [len(self.ids)] * (last + 1)
        self.door = 0
        self.drafts: list[Token] = []
        self.pace: Pace | None = None
        self.limit = self.policy.max_pending
        self.pending = 0
        self.asks = True

    def window(self, i: int) -> Window:
        """What segment `i` has not computed yet."""
        first = self.done[i]
        if i:
            return Window(self.slot, self.done[i - 1] - first)
        return Window(self.slot, len(self.ids) - first, self.ids[first:])

    def may_leave(self, layer: int) -> bool:
        """Whether the newest token may leave at `layer`, if it is sure enough."""
        return layer in self.policy.thresholds and self.pending < self.limit


def _prompt_kind(row: _Row) -> tuple[int, str, bool]:
    """Prompts of a kind are read together."""
    return row.last, row.policy.measure, row.policy.final


Event = tuple[Request, Token]


class Engine:
    """Decodes many sequences at a time; one engine, one stream of requests at a time."""

    def __init__(
        self,
        model: EarlyExitModel,
        exit_layers: Sequence[int],
        *,
        slots: int = 1,
        capacity: int,
        max_pending: int = 8,
        compile: bool = False,
        stage: range | None = None,
    ) -> None:
        """exit_layers: the exits that any request may use. slots: sequences at a time.
        capacity: tokens of a sequence at most. max_pending: the largest of any request.
        compile, stage: see `ee_tuning.decode.passes.Passes`.

        Raises:
            UserError: the K/V do not fit into the memory that is free.
        """
        self.passes = Passes(
            model,
            exit_layers,
            slots=slots,
            capacity=capacity,
            longest=min(max_pending + 1, capacity),
            compile=compile,
            stage=stage,
        )
        self.exit_layers, self.max_pending = list(exit_layers), max_pending
        self._stops = [segment.stop for segment in self.passes.segments]
        self._rows: list[_Row | None] = [None] * slots
        self.streams = False  # whether a stream is in progress
        self._mistake: UserError | None = None  # of a request: no further one is taken
        self._draft_cost = cache(partial(draft_cost, model))

    @property
    def busy(self) -> int:
        """How many slots have a sequence in them."""
        return sum(row is not None for row in self._rows)

    def warm_up(self, measures: Sequence[str] = ("probability",)) -> float:
        """Compile and capture everything now; gives the seconds it took."""
        assert not self.streams
        return self.passes.warm_up(measures)

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Every token of every request, as soon as it is settled.

        The next request is taken when a slot is free for it. Ending the iteration early gives up
        what is in progress.

        Raises:
            UserError: a request does not fit this engine, or cannot be had: once what is in
                progress has ended.
        """
        assert not self.streams, "an engine runs one stream at a time"
        self._mistake, self._generators = None, Generators(self.passes.device)
        self.streams = True
        try:
            yield from self._events(iter(requests))
            if self._mistake is not None:
                raise self._mistake
        finally:
            self._rows = [None] * len(self._rows)
            self._generators.close()
            self.streams = False

    def _events(self, waiting: Iterator[Request]) -> Iterator[Event]:
        while True:
            yield from self._admit(waiting)
            if not self.busy:
                return
            live = [row for row in self._rows if row is not None]
            door = min(row.door for row in live)
            yield from self._advance(door, [row for row in live if row.door == door])

    def _admit(self, waiting: Iterator[Request]) -> Iterator[Event]:
        """Fill the free slots with the next requests, and read their prompts."""
        for slot, row in enumerate(self._rows):
            if row is not None and row.request.cancelled:
                self._rows[slot] = None
        while new := self._begin_rows(waiting):
            for kind, group in groupby(sorted(new, key=_prompt_kind), key=_prompt_kind):
                last, measure, final = kind
                given = {row.slot: row.request.ids for row in group}
                wanted = Wanted("last", final, measure)
                for read in self.passes.prompts(given, last, wanted, self._starts):
                    row = self._rows[read.slot]
                    assert row is not None
                    assert read.found is not None
                    yield from self._settle(row, read.found, read.window, 1)

    def _begin_rows(self, waiting: Iterator[Request]) -> list[_Row]:
        """A row for the next request in each free slot."""
        new = []
        for slot, row in enumerate(self._rows):
            request = self._next(waiting) if row is None else None
            if request is None:
                continue
            self._generators.give(request.chooser)
            policy = request.policy
            row = self._rows[slot] = _Row(request, slot, self._stops.index(policy.end))
            if policy.verifies:
                row.pace = Pace(policy.max_pending, self._draft_cost(min(policy.thresholds)))
            new.append(row)
        return new

    def _next(self, waiting: Iterator[Request]) -> Request | None:
        """The next request; none after a mistake in one, which waits for what is in progress."""
        if self._mistake is not None:
            return None
        try:
            request = next(waiting, None)
            if request is not None:
                self.check(request)
        except UserError as mistake:
            self._mistake = mistake
            return None
        return request

    def _starts(self, i: int) -> list[int]:
        """For every slot, how many tokens segment `i` has computed."""
        return [row.done[i] if row and i <= row.last else 0 for row in self._rows]

    def _advance(self, i: int, rows: list[_Row]) -> Iterator[Event]:
        """Rows that stand before segment `i` go through it, those that want the same together."""

        def kind(row: _Row) -> tuple[str, bool]:
            return row.policy.measure, i == row.last and row.policy.final

        for (measure, final), group in groupby(sorted(rows, key=kind), key=kind):
            alike = list(group)
            wanted = Wanted(self._after(i, alike), final, measure)
            windows = [row.window(i) for row in alike]
            found = self.passes.window(i, windows, self._starts(i), wanted)
            for j, row in enumerate(alike):
                row.done[i] += windows[j].count
                yield from self._decide(i, row, found, j, windows[j].count)

    def _after(self, i: int, rows: list[_Row]) -> str:
        """What a pass of segment `i` has to predict for `rows`."""
        if any(i == row.last and row.drafts for row in rows):
            return "each"
        return "last" if any(self._asks(i, row) for row in rows) else "nothing"

    def _asks(self, i: int, row: _Row) -> bool:
        """Whether what follows the newest token of `row` may be found after segment `i`."""
        return row.asks and (i == row.last or row.may_leave(self._stops[i]))

    def _decide(
        self, i: int, row: _Row, found: Predictions | None, j: int, count: int
    ) -> Iterator[Event]:
        """What becomes of a row, window `j` of a pass of segment `i`."""
        layer = self._stops[i]
        if i == row.last:
            assert found is not None
            yield from self._settle(row, found, j, count)
            return
        row.door = i + 1
        if found is None or not self._asks(i, row):
            return
        prediction = found.of(j, 0)
        if row.policy.leaves(layer, prediction.confidence):
            row.door = 0
            chosen, q = row.request.chooser.choose(row.ids, prediction)
            token = Token(chosen, layer, prediction.confidence, q)
            row.ids.append(chosen)
            row.pending += 1
            if row.policy.verifies:
                row.drafts.append(token)
            else:
                yield from self._emit(row, [token])

    def _settle(self, row: _Row, found: Predictions, j: int, count: int) -> Iterator[Event]:
        """A token went to the end: keep drafts while the end agrees, then take its own token.

        count: tokens of window `j`. If there are drafts, there are predictions after each.
        """
        drafts = row.drafts
        first, place = len(row.ids) - len(drafts), count - 1 - len(drafts)
        after = [found.of(j, place + k) for k in range(len(drafts) + 1)]
        kept, own = row.request.chooser.verify(row.ids, after, drafts)
        row.ids[first + kept :] = [own]
        row.done = [min(done, len(row.ids) - 1) for done in row.done]
        row.door, row.pending, row.drafts = 0, 0, []
        if row.pace is not None:
            row.pace.learn(len(drafts), kept)
            row.limit = row.pace.drafts(row.request.max_length - len(row.ids))
        token = Token(own, self._stops[row.last], after[kept].confidence)
        yield from self._emit(row, [*drafts[:kept], token])

    def _emit(self, row: _Row, tokens: list[Token]) -> Iterator[Event]:
        """Hand out settled tokens, the last ones of row.ids, until one of them ends the text.

        Once a request is cancelled there are no more, and `_admit` frees its slot.
        """
        request = row.request
        for length, token in enumerate(tokens, start=len(row.ids) - len(tokens) + 1):
            if request.cancelled:
                return
            ends = length >= request.max_length or request.stops(row.ids[:length])
            request.finished = ends
            if ends:
                self._rows[row.slot] = None
            token.probabilities = None  # a text may be kept for long
            yield request, token
            if ends:
                return

    def check(self, request: Request, capacity: int | None = None) -> None:
        """Refuse what this engine was not made for.

        capacity: tokens that a text may have, if fewer than there is room for.

        Raises:
            UserError: a longer text, or exits or a pending bound beyond those of all prompts.
        """
        policy, room = request.policy, capacity or self.passes.capacity
        if request.max_length > room:
            raise UserError(
                f"{request.max_length} tokens with the prompt are asked for, there is room for "
                f"{room}: ask for fewer, or raise capacity"
            )
        missing = sorted({*policy.exit_layers} - {*self.exit_layers})
        if missing:
            raise UserError(
                f"the exit at layer {missing[0]} is not among those of all prompts, "
                f"{self.exit_layers}: add it to their exit_layers"
            )
        if policy.max_pending > self.max_pending:
            raise UserError(
                f"max_pending {policy.max_pending} is above that of all prompts, "
                f"{self.max_pending}: raise that"
            )
