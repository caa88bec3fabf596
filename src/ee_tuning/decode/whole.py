"""Many whole texts at full depth, as fast as they can be had.

Texts begin in waves: as many as there are slots are read together, and the next ones when all of
these have ended. So all of a wave look back equally far, and a text's neighbours are always the
same. Between two looks of the host a text goes on by several tokens; those behind its end are lost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ee_tuning.decode.engine import Engine
from ee_tuning.decode.sampling import check_evidence
from ee_tuning.decode.sequences import Request, Row
from ee_tuning.passes.draws import NOTHING, Warp, samples_of
from ee_tuning.passes.prompts import read
from ee_tuning.passes.wanted import Wanted

AHEAD = 8  # tokens between two looks
PLAIN = Warp()


@dataclass(eq=False)
class Text(Request):
    """A text to be written at full depth.

    ends: tokens that end it. seed, warp: how its tokens are drawn; without a seed the likeliest
    are taken.
    """

    ends: Collection[int] = ()
    seed: int | None = None
    warp: Warp = PLAIN

    def end(self, ids: Sequence[int], first: int) -> int:
        """The length at which the text ends, if not before `first` tokens; 0 if it goes on."""
        for length in range(first, len(ids) + 1):
            over = length >= self.max_length or ids[length - 1] in self.ends
            if over or self.stops(ids, length):
                return length
        return 0


def whole_texts(
    engine: Engine, waiting: deque[Text], ahead: int = AHEAD
) -> Iterator[tuple[Text, list[int]]]:
    """Each text as it ends, as the tokens that its prompt goes on with.

    engine: without exits, and without anything in progress. waiting: taken from the left, and may
    grow meanwhile. ahead: tokens between two looks of the host.

    Raises:
        UserError: a text does not fit the engine, or logits are not finite.
    """
    assert not engine.busy
    wave = Wave(engine, ahead)
    try:
        while waiting or wave.rows:
            with engine.turn:
                over = wave.go_on() if wave.rows else wave.begin(waiting)
            yield from over
    finally:
        engine.sequences.clear()


class Wave:
    """Texts that have begun together; rows: those in progress, by slot."""

    def __init__(self, engine: Engine, ahead: int) -> None:
        self.engine, self.sequences, self.passes = engine, engine.sequences, engine.passes
        self.ahead, self.last = min(ahead, self.passes.longest), len(self.passes.segments) - 1
        self.rows: list[tuple[Row, Text]] = []

    def begin(self, waiting: deque[Text]) -> list[tuple[Text, list[int]]]:
        """Read as many prompts as there are slots; gives the texts that end with one token."""
        for slot in range(min(self.passes.slots, len(waiting))):
            text = waiting.popleft()
            self.engine.check(text)
            self.rows.append((self.sequences.enter(text, slot), text))
            self.passes.draws.set(slot, text.seed, text.warp)
        self.passes.draws.tell()
        prompts, first = {row.slot: text.ids for row, text in self.rows}, {}
        idle = [0] * self.passes.slots
        for reads in read(self.passes, prompts, self.last, self._wanted(), lambda i: list(idle)):
            for one in reads:
                assert one.found is not None
                check_evidence(one.found.confidence)
                first[one.slot] = [one.found.token]
                idle[one.slot] = len(prompts[one.slot])
        return self._take([first[row.slot] for row, _ in self.rows])

    def go_on(self) -> list[tuple[Text, list[int]]]:
        """Some tokens more of each text; gives those that end."""
        count = min(self.ahead, max(row.left for row, _ in self.rows))
        newest = {row.slot: row.ids[-1] for row, _ in self.rows}
        starts = [0] * self.passes.slots
        for row, _ in self.rows:
            starts[row.slot] = len(row.ids) - 1
        straight = self.passes.straight(newest, starts, self._wanted())
        found = straight.find(count)[:, :, straight.rows].tolist()
        for _, confidences in found:
            if not math.isfinite(sum(confidences)):
                check_evidence(math.nan)
        return self._take([*zip(*(tokens for tokens, _ in found), strict=True)])

    def _wanted(self) -> Wanted:
        samples = samples_of(
            NOTHING if text.seed is None else text.warp.samples for _, text in self.rows
        )
        return Wanted("last", True, samples=samples)

    def _take(self, tokens: Sequence[Sequence[float]]) -> list[tuple[Text, list[int]]]:
        """Take in the next tokens of each row, up to its end; gives the texts that are there."""
        over, going = [], []
        for pair, own in zip(self.rows, tokens, strict=True):
            row, text = pair
            known = len(row.ids)
            row.ids += map(int, own)
            if length := text.end(row.ids, known + 1):
                over.append((text, row.ids[len(text.ids) : length]))
                self.sequences.free(row)
            else:
                going.append(pair)
        self.rows = going
        return over
