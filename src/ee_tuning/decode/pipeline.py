"""Pipeline-based decoding (arXiv 2312.04916): an `Engine` whose layers are cut into stages.

Every token goes through all stages, one after another. The stage at which it leaves tells the first
one, which begins the next token at once, while later stages go on computing K/V of this one. So
nothing is recomputed, and no token waits for layers that it does not need.

Every stage is given the same requests, sees the same tokens in the same order, and gives the same
events.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ee_tuning.decode.engine import Engine, Event, Request, _Row
from ee_tuning.decode.mail import Fate, Kind, Mail, Message, News
from ee_tuning.decode.passes import Prediction, Predictions, Wanted
from ee_tuning.decode.speculative import Token
from ee_tuning.errors import UserError

if TYPE_CHECKING:
    from ee_tuning.model import EarlyExitModel

NO_DRAFTS = (
    "mode speculative cannot be had with --pp: drafts would be taken back on every stage; use "
    "--mode threshold, or --pp 1"
)


class Stage(Engine):
    """Decodes many sequences at a time, together with the other stages; see `Engine`."""

    def __init__(self, model: EarlyExitModel, exit_layers: Sequence[int], **settings: Any) -> None:
        """model: has this stage's layers; its `mesh` is connected. settings: those of `Engine`."""
        super().__init__(model, exit_layers, stage=model.stage, **settings)
        self.mesh, self.start = model.mesh, model.stage.start
        slots, backbone = len(self._rows), model.backbone
        size = (0, backbone.config.hidden_size)
        like = torch.empty(size, dtype=backbone.dtype, device=backbone.device)
        self._any_token = torch.ones(backbone.config.vocab_size, device=backbone.device)
        # A row has `max_pending` tokens that left before this stage, one that asks, and an end.
        self._mail = Mail(self.mesh, slots * (self.max_pending + 2), like)
        # Fewer at a time, so that every stage has something to do.
        self._at_a_time = math.ceil(slots / self.mesh.pp)
        self._answers: list[News] = []  # to the first stage
        self._given_up = False

    def _events(self, waiting: Iterator[Request]) -> Iterator[Event]:
        """Every process has to be given the same requests."""
        self._given_up = False
        events = self._lead(waiting) if self.passes.is_first else self._follow(waiting)
        self._mail.open()
        try:
            for event in events:  # noqa: UP028 - closed, `yield from` would close `events`, too
                yield event
        except GeneratorExit:
            self._given_up = True
            for _ in events:  # the other stages wait for what this one still has to do
                pass
            raise

    def _lead(self, waiting: Iterator[Request]) -> Iterator[Event]:
        """The first stage: begins prompts and tokens."""
        ready: list[News] = []
        while True:
            for slot, row in enumerate(self._rows):
                if row is None and not self._given_up and self._mistake is None:
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
            self._compute([item for item in news if item.fate] + begun)
        self._mail.close()

    def _follow(self, waiting: Iterator[Request]) -> Iterator[Event]:
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
            self._compute(news)
        self._mail.close()

    def _begin(self, slot: int, request: Request | None, hidden: Tensor | None = None) -> None:
        """Read a prompt; hidden: (P, H), what the stage before gave for it."""
        if request is None:  # the next stage will find the same mistake
            self._mail.tell_next(Message(Kind.PROMPT, [News(slot)]))
            return
        policy = request.policy
        # Rows that end before this stage have no segment here; one more if they end after it.
        last = sum(stop < policy.end for stop in self._stops) if policy.end > self.start else -1
        row = self._rows[slot] = _Row(request, slot, last)
        self._generators.give(request.chooser)
        if last >= 0:
            asks = self._ends_here(row)
            wanted = Wanted("last" if asks else "nothing", asks and policy.final, policy.measure)
            inputs = row.ids if hidden is None else hidden
            through = min(last, len(self._stops) - 1)
            (read,) = self.passes.prompts({slot: inputs}, through, wanted, self._starts)
            hidden = read.hidden
            if read.found is not None:
                self._answer(row, policy.end, read.found.of(0, 0))
        self._post_answers(alive=True)
        states = len(row.ids) if self._goes_beyond(row) else 0
        self._mail.tell_next(Message(Kind.PROMPT, [News(slot, states=states)], hidden))

    def _take(self, item: News, fate: int) -> Iterator[Event]:
        """Take in a row's next token."""
        row = self._rows[item.slot]
        assert row is not None
        request, item.fate = row.request, fate
        row.ids.append(item.id)
        row.pending = 0 if item.exit_layer == row.policy.end else row.pending + 1
        row.asks, row.door = item.asks, 0
        request.finished = fate == Fate.ENDS
        if fate:
            self._rows[row.slot] = None
            self._catch_up(row)
        if fate != Fate.GIVEN_UP:
            yield request, Token(item.id, item.exit_layer, item.confidence)

    def _fate(self, item: News) -> Fate:
        """What becomes of a row with its next token, on the first stage."""
        row = self._rows[item.slot]
        assert row is not None
        request, ids = row.request, [*row.ids, item.id]
        if request.cancelled or self._given_up:
            return Fate.GIVEN_UP
        ends = len(ids) >= request.max_length or request.stops(ids)
        return Fate.ENDS if ends else Fate.GOES_ON

    def _compute(self, news: list[News]) -> None:
        """Take the tokens that have come through this stage, and hand them on."""
        alive = {item.slot: row for item in news if (row := self._rows[item.slot]) is not None}
        for i in range(len(self._stops)):
            rows = [row for row in alive.values() if i <= row.last]
            for _ in self._advance(i, rows) if rows else ():
                pass
            self._post_answers()
        self._post_answers(alive=True)
        for item in news:
            row = alive.get(item.slot)
            item.states = int(row is not None and self._goes_beyond(row))
            item.asks = row is not None and row.asks and item.position == len(row.ids) - 1
        if news and not self.passes.is_last:
            hidden = self.passes.take(*_places([item for item in news if item.states]))
            self._mail.tell_next(Message(Kind.TOKENS, news, hidden))

    def _decide(
        self, i: int, row: _Row, found: Predictions | None, j: int, count: int
    ) -> Iterator[Event]:
        """Whether the newest token of a row leaves here; it goes on all the same."""
        layer = self._stops[i]
        if found is not None and self._asks(i, row):
            prediction = found.of(j, 0)
            if i == row.last or row.policy.leaves(layer, prediction.confidence):
                self._answer(row, layer, prediction)
        row.door = i + 1
        return iter(())

    def _answer(self, row: _Row, layer: int, found: Prediction) -> None:
        """What follows the newest token of a row is found."""
        self._catch_up(row)
        chosen, _ = row.request.chooser.choose(row.ids, found)
        place, row.asks = len(row.ids), False
        self._answers.append(News(row.slot, chosen, place, layer, found.confidence, asks=True))

    def _post_answers(self, alive: bool = False) -> None:
        """Tell the first stage at once what was found.

        alive: if nothing, tell it that: it waits for a stage that says nothing no longer than
        --timeout.
        """
        if (self._answers or alive) and not self.passes.is_first:
            self._mail.tell_first(Message(Kind.TOKENS, self._answers))
            self._answers = []

    def _catch_up(self, row: _Row) -> None:
        """Leave out the draws of the row's tokens that were chosen elsewhere."""
        row.request.chooser.catch_up(len(row.ids) - len(row.request.ids), self._any_token)

    def _ends_here(self, row: _Row) -> bool:
        return 0 <= row.last < len(self._stops)

    def _goes_beyond(self, row: _Row) -> bool:
        return row.last == len(self._stops)

    def check(self, request: Request, capacity: int | None = None) -> None:
        """As an engine's; drafts are refused, too."""
        super().check(request, capacity)
        if request.policy.verifies:
            raise UserError(NO_DRAFTS)


def _places(news: list[News]) -> tuple[list[int], list[int]]:
    return [item.slot for item in news], [item.position for item in news]
