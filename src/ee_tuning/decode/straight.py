"""Rows that go straight through the one segment there is: some tokens between two looks.

The device feeds each text with what it has found. So that it does not wait while the host hands
tokens out, it may be at the next ones meanwhile: of those rows that go on then, as far as the host
knows, and of others that have come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from statistics import median
from typing import NamedTuple

import torch

from ee_tuning.decode.alone import TOKENS, at_once
from ee_tuning.decode.rounds import Line
from ee_tuning.decode.sampling import Chooser, Token
from ee_tuning.decode.sequences import Row, Sequences, Settled
from ee_tuning.passes.straight import Straight
from ee_tuning.passes.wanted import Wanted


class Look(NamedTuple):
    """Tokens of `rows` that the device finds while the host does not look.

    rows: by slot. number: of each. lines: where this look is read, and where the next one.
    """

    rows: list[Row]
    number: int
    straight: Straight
    lines: tuple[Line, Line]

    def begun(self) -> Look:
        """Let the device find them: itself."""

        def find() -> None:
            found = self.straight.find(self.number)
            self.lines[0].said[: self.number, :, : found.shape[2]] = found

        self.lines[0].follow(find)
        return self

    def read(self) -> tuple[list[list[list[float]]], float]:
        """Of each token in turn, it and how sure it is, by row; and the seconds that all took the
        device."""
        said, seconds = self.lines[0].read()
        rows = self.straight.rows
        return [[[of[i] for i in rows] for of in one] for one in said[: self.number]], seconds


class Timing:
    """How long the host took lately from one reading of a look to the next, and the device for a
    token, in seconds."""

    LATELY = 8  # readings that count
    LONG = 2.0  # tokens that take so many times what the host takes are looked at one by one

    def __init__(self) -> None:
        self._hosts, self._tokens = (deque[float](maxlen=self.LATELY) for _ in range(2))

    def learn(self, host: float, token: float) -> None:
        """Take in a reading behind another, before which the next look was begun."""
        self._hosts.append(host)
        self._tokens.append(token)

    def number(self, count: int, behind: bool) -> int:
        """Tokens of the next look, as of `at_once`: as few as let the device not wait for the host,
        so that whoever has come, or leaves, waits for as few."""
        if behind and self._hosts and median(self._tokens) > self.LONG * median(self._hosts):
            return 1
        return at_once(count, behind)


class Several:
    """Rows of an engine of one segment, of which none has drafts."""

    def __init__(self, sequences: Sequences) -> None:
        assert len(sequences.stops) == 1
        self._sequences = sequences
        self._look: Look | None = None  # that was begun before the one in front of it was over
        self._timing = Timing()
        self._read_at = 0.0  # the last one

    def serves(self, rows: Sequence[Row]) -> bool:
        """Whether these rows go token by token, and passes choose."""
        kinds = {(row.policy.measure, row.policy.final) for row in rows}
        if self._sequences.passes.group is not None or len(kinds) > 1:
            return False
        _, final = kinds.pop()
        chosen = all(type(row.request.chooser) is Chooser for row in rows)
        ends = all(row.ends and row.request.chooser.in_passes for row in rows)
        return final and chosen and ends

    def underway(self, rows: Sequence[Row]) -> bool:
        """Whether the device is at the next tokens of some of `rows`, or has found them."""
        return self._look is not None and any(row in self._look.rows for row in rows)

    @torch.inference_mode()
    def go_on(
        self, rows: Sequence[Row], count: int, behind: bool = False
    ) -> tuple[list[Settled], float]:
        """The next `count` ≤ `TOKENS` tokens, or fewer, of rows that it `serves`, or what is
        `underway`: as of as many rounds without drafts, in one look, with little to do for each.
        Also gives the seconds that they took the device.

        behind: as many as `Timing` says, and as many more are begun before the host looks at these.

        Rows that have come while the device is at others are among those of the next look.
        """
        number, live = self._timing.number(count, behind), {*rows}
        begun = self._look if self.underway(rows) else None
        look = begun or self._begin(rows, number)
        self._look = self._follow(look, rows, number) if behind else None
        host = time.perf_counter() - self._read_at
        found, seconds = look.read()
        self._read_at = time.perf_counter()
        if begun is not None and self._look is not None:
            self._timing.learn(host, seconds / look.number)
        settled: list[Settled] = []
        for place, row in enumerate(look.rows):
            if row not in live:
                continue
            own = row.evident((ids[place], confidences[place]) for ids, confidences in found)
            tokens = [Token(int(number), row.policy.end, confidence) for number, confidence in own]
            row.ids += [token.id for token in tokens]
            row.done = [len(row.ids) - 1]
            settled.append((row, tokens))
        return settled, seconds

    @cached_property
    def _lines(self) -> tuple[Line, Line]:
        """Where looks are read, in turn."""
        passes = self._sequences.passes
        size = TOKENS, 2, passes.slots
        said = torch.zeros(size, dtype=torch.float64, device=passes.device)
        return Line(said), Line(said)

    def _begin(self, rows: Sequence[Row], count: int) -> Look:
        """The first look at some rows: the device is told of them."""
        number = min(count, max(row.left for row in rows))
        return Look([*rows], number, self._straight(rows), self._lines).begun()

    def _follow(self, look: Look, rows: Sequence[Row], count: int) -> Look | None:
        """A look behind another, of those of `rows` that have not ended by then: unless that is
        one, or what they ask for is no longer one and the same."""
        seen = {*look.rows}
        left = {row: row.left - (row in seen and look.number) for row in rows}
        going = [row for row in rows if left[row] > 0]
        if len(going) < 2 or not self.serves(going):
            return None
        alike, number = going == look.rows, min(count, max(left[row] for row in going))
        finds = look.straight if alike else self._straight(going, look)
        return Look(going, number, finds, look.lines[::-1]).begun()

    def _straight(self, rows: Sequence[Row], behind: Look | None = None) -> Straight:
        """What goes on with rows. behind: that look, which knows some of them better."""
        sequences = self._sequences
        wanted = Wanted("last", True, rows[0].policy.measure, sequences.samples(rows))
        newest = {row.slot: row.ids[-1] for row in rows}
        starts = sequences.starts(0)
        if behind is None:
            return sequences.passes.straight(newest, starts, wanted)
        seen = {*behind.rows}
        known = [row.slot for row in rows if row in seen]
        for slot in known:
            starts[slot] += behind.number
        return sequences.passes.straight(newest, starts, wanted, behind.straight, known)
