"""Pipeline-based decoding (arXiv 2312.04916): an engine whose layers are cut into stages.

Every token goes through all stages, one after another. The stage at which it leaves tells the first
one, which begins the next token at once. What this one still lacks of its stage is computed with
the row's next token that goes on from there, in one pass; later stages go on computing K/V of what
has come to them. So nothing is recomputed, and no token waits for layers that it does not need.

Every stage is given the same requests, sees the same tokens in the same order, and gives the same
events.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ee_tuning.config import Leaving
from ee_tuning.decode.mail import Fate, Kind, Mail, Message, News
from ee_tuning.decode.sampling import Asked, Token, choose
from ee_tuning.decode.sequences import Request, Row, Sequences
from ee_tuning.errors import UserError
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.passes.draws import NOTHING
from ee_tuning.passes.noise import Seeds
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.wanted import Prediction
from ee_tuning.passes.warm import to_warm

LATE = 8  # tokens of a row that wait within a stage at most: the next stage hears of them then


class Stage:
    """Decodes many sequences at a time, together with the other stages.

    `stream` gives what an `ee_tuning.decode.engine.Engine` gives.
    """

    def __init__(
        self,
        model: Network,
        exit_layers: Sequence[int],
        *,
        mesh: Mesh,
        slots: int = 1,
        capacity: int,
        max_pending: int = Leaving.max_pending,
        compile: bool = False,
    ) -> None:
        """model: has this stage's layers. mesh: connected. The rest is as for an engine."""
        self.passes = Passes(
            model,
            exit_layers,
            slots=slots,
            capacity=capacity,
            longest=min(max_pending + 1, capacity),
            compile=compile,
            stage=model.stage,
        )
        self.sequences = Sequences(self.passes, exit_layers, max_pending)
        self.streams = False  # whether a stream is in progress
        backbone = model.backbone
        like = torch.empty((0, backbone.config.hidden_size), dtype=backbone.dtype)
        # A row has `max_pending` tokens that left before this stage, one that asks, and an end.
        self._mail = Mail(mesh, slots * (max_pending + 2), like.to(backbone.device))
        # Fewer at a time, so that every stage has something to do.
        self._at_a_time = math.ceil(slots / mesh.pp)
        self._answers: list[News] = []  # to the first stage
        # By slot, tokens that left within this stage and were not handed on yet.
        self._late: dict[int, list[News]] = {}
        self._given_up = False
        self._mistake: UserError | None = None  # of a request: no further one is taken

    @property
    def busy(self) -> int:
        """How many slots have a sequence in them."""
        return len(self.sequences.live)

    @torch.inference_mode()
    def warm_up(
        self,
        measures: Sequence[str] = (Leaving.measure,),
        samples: Sequence[int] = (NOTHING,),
        drafts: bool = False,
    ) -> None:
        """As of an engine; there are no drafts."""
        assert not self.busy
        assert not drafts
        for job in to_warm(self.passes, measures, samples, texts=False):
            job()

    def check(self, request: Request, capacity: int | None = None) -> None:
        """See `Sequences.check`; drafts are refused, too: they wait for the last stage."""
        self.sequences.check(request, capacity)
        if request.policy.verifies:
            raise UserError(
                f"with --pp, mode {request.policy.mode} is for all prompts: stages then work in "
                "turns; give it for all, or another one here"
            )

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Token]]:
        """As of an engine; every process has to be given the same requests."""
        assert not self.streams, "a stage runs one stream at a time"
        self._mistake, self._given_up = None, False
        self.streams, self._seeds = True, Seeds()
        waiting = iter(requests)
        events = self._lead(waiting) if self.passes.is_first else self._follow(waiting)
        self._mail.open()
        try:
            for event in events:  # noqa: UP028 - closed, `yield from` would close `events`, too
                yield event
            if self._mistake is not None:
                raise self._mistake
        except GeneratorExit:
            self._given_up = True
            for _ in events:  # the other stages wait for what this one still has to do
                pass
            raise
        finally:
            self.sequences.clear()
            self._late.clear()
            self.streams = False

    def _lead(self, waiting: Iterator[Request]) -> Iterator[tuple[Request, Token]]:
        """The first stage: begins prompts and tokens."""
        ready: list[News] = []
        while True:
            for slot in self.sequences.free_slots:
                if not self._given_up and self._mistake is None:
                    request = self._next(waiting)
                    if request is not None or self._mistake is not None:
                        self._begin(slot, request)
            if not self.busy:
                break
            news, self._answers = self._answers, []
            news += self._mail.answers(wait=not news and not ready)
            for item in news:
                yield from self._take(item, self._fate(item))
            ready += [item for item in news if not item.fate]
            begun, ready = ready[: self._at_a_time], ready[self._at_a_time :]
            # What ended is told before its slot has another prompt.
            self.compute([item for item in news if item.fate] + begun)
        self._mail.close()

    def _follow(self, waiting: Iterator[Request]) -> Iterator[tuple[Request, Token]]:
        """A later stage: goes on with what the one before gives."""
        while (message := self._mail.read()).kind != Kind.STOP:
            news, hidden = message.news, message.hidden
            assert hidden is not None
            if message.kind == Kind.PROMPT:
                self._begin(news[0].slot, self._next(waiting), hidden)
                continue
            for item in news:
                yield from self._take(item, item.fate)
            come = [item for item in news if item.states]
            self.passes.put(*_places(come), hidden)
            self.compute(news)
        self._mail.close()

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

    def _begin(self, slot: int, request: Request | None, hidden: Tensor | None = None) -> None:
        """Read a prompt; hidden: (P, H), what the stage before gave for it."""
        if request is None:  # the next stage will find the same mistake
            self._mail.tell_next(Message(Kind.PROMPT, [News(slot)]))
            return
        row = self.sequences.enter(request, slot, self._seeds)
        if row.through:
            (((_, read),),) = self.sequences.read([row], hidden)
            hidden = read.hidden
            if read.found is not None:
                self._answer(row, row.policy.end, read.found)
        self._post_answers(alive=True)
        states = len(row.ids) if self._goes_beyond(row) else 0
        self._mail.tell_next(Message(Kind.PROMPT, [News(slot, states=states)], hidden))

    def _take(self, item: News, fate: int) -> Iterator[tuple[Request, Token]]:
        """Take in a row's next token."""
        row = self.sequences.rows[item.slot]
        assert row is not None
        request, item.fate = row.request, fate
        row.ids.append(item.id)
        row.pending = 0 if item.exit_layer == row.policy.end else row.pending + 1
        row.asks, row.door = item.asks, 0
        request.finished = fate == Fate.ENDS
        if fate:
            self.sequences.free(row)
        if fate != Fate.GIVEN_UP:
            yield request, Token(item.id, item.exit_layer, item.confidence, request.finished)

    def _fate(self, item: News) -> Fate:
        """What becomes of a row with its next token, on the first stage."""
        row = self.sequences.rows[item.slot]
        assert row is not None
        request, length = row.request, len(row.ids) + 1
        if request.cancelled or self._given_up:
            return Fate.GIVEN_UP
        row.ids.append(item.id)  # for a look: a copy of the text for every token would be long
        ends = length >= request.max_length or request.stops(row.ids, length)
        row.ids.pop()
        return Fate.ENDS if ends else Fate.GOES_ON

    def compute(self, news: list[News]) -> None:
        """Take the tokens that have come through this stage, and hand them on."""
        rows = self.sequences.rows
        alive = {item.slot: row for item in news if (row := rows[item.slot]) is not None}
        left: set[int] = set()  # slots of rows that wait within this stage for their next token
        said = False
        for i, layer in enumerate(self.sequences.stops):
            here = [row for row in alive.values() if i < row.through and row.slot not in left]
            for answers in self.sequences.advance(i, here):
                for row, found in answers:
                    if row.is_last(i) or row.policy.leaves(layer, found, row.ids):
                        self._answer(row, layer, found)
                        if i < row.through - 1 and len(self._late.get(row.slot, ())) < LATE:
                            left.add(row.slot)
            said = self._post_answers() or said
        self._post_answers(alive=not said)
        for item in news:
            self._late.setdefault(item.slot, []).append(item)
        told = [item for slot in dict.fromkeys(item.slot for item in news) if slot not in left
                for item in self._late.pop(slot)]  # fmt: skip
        for item in told:
            given = alive.get(item.slot)
            item.states = int(given is not None and self._goes_beyond(given))
            item.asks = given is not None and given.asks and item.position == len(given.ids) - 1
        if told and not self.passes.is_last:
            hidden = self.passes.take(*_places([item for item in told if item.states]))
            self._mail.tell_next(Message(Kind.TOKENS, told, hidden))

    def _answer(self, row: Row, layer: int, found: Prediction) -> None:
        """What follows the newest token of a row is found."""
        (chosen,) = choose([Asked(row.request.chooser, row.ids, [found])])
        if chosen.error is not None:
            raise chosen.error
        place, row.asks = len(row.ids), False
        self._answers.append(
            News(row.slot, chosen.token, place, layer, found.confidence, asks=True)
        )

    def _post_answers(self, alive: bool = False) -> bool:
        """Tell the first stage at once what was found; gives whether it was told anything.

        alive: if nothing, tell it that: it waits for a stage that says nothing no longer than
        --timeout.
        """
        tells = bool(self._answers or alive) and not self.passes.is_first
        if tells:
            self._mail.tell_first(Message(Kind.TOKENS, self._answers))
            self._answers = []
        return tells

    def _goes_beyond(self, row: Row) -> bool:
        return row.policy.end > self.sequences.stops[-1]


def _places(news: list[News]) -> tuple[list[int], list[int]]:
    return [item.slot for item in news], [item.position for item in news]
