"""Rows that go straight through the one segment there is: several tokens between two looks.

The device feeds each text with what it has found. So that it does not wait while the host hands
tokens out, it may be at the next ones meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ee_tuning.decode.alone import TOKENS
from ee_tuning.decode.rounds import Line
from ee_tuning.decode.sampling import Chooser, Token
from ee_tuning.decode.sequences import Row, Sequences, Settled
from ee_tuning.passes.straight import Straight
from ee_tuning.passes.wanted import Wanted, Window


class Look(NamedTuple):
    """Tokens of `rows` that the device finds while the host does not look.

    lengths: of their texts before these. number: tokens of each. lines: where this look is read,
    and where the next one. round: of the engine, in which it was begun.
    """

    rows: list[Row]
    lengths: list[int]
    number: int
    straight: Straight
    lines: tuple[Line, Line]
    round: int

    def begun(self) -> Look:
        """Let the device find them: itself."""

        def find() -> None:
            self.lines[0].said[: self.number] = self.straight.find(self.number)

        self.lines[0].follow(find)
        return self

    def read(self) -> list[list[list[float]]]:
        """Of each token in turn, it and how sure it is, by row."""
        said, _ = self.lines[0].read()
        return [[[of[i] for i in self.straight.rows] for of in one] for one in said[: self.number]]


def full_round(
    sequences: Sequences, rows: Sequence[Row], count: int, behind: bool = False
) -> list[Settled]:
    """The next `count` tokens, or fewer, of rows that all `go_straight`: as of as many rounds
    without drafts, in one look, with little to do for each token.

    behind: the device may be so many ahead, at half of them while the host looks at the others.
    Rows that came meanwhile are part of the next round.
    """
    number = max(1, count // 2) if behind else count
    look = (_underway(sequences, rows) if behind else None) or _begin(sequences, rows, number)
    sequences.look = _follow(sequences, look, rows, number) if behind else None
    found, live = look.read(), set(rows)
    settled: list[Settled] = []
    for place, row in enumerate(look.rows):
        if row not in live:
            continue
        own = row.evident((ids[place], confidences[place]) for ids, confidences in found)
        tokens = [Token(int(number), row.policy.end, confidence) for number, confidence in own]
        row.ids += [token.id for token in tokens]
        row.done = [len(row.ids) - 1]
        settled.append((row, tokens))
    return settled


def go_straight(sequences: Sequences, rows: Sequence[Row]) -> bool:
    """Whether `rows` go through the one segment there is, token by token, and passes choose."""
    kinds = {(row.policy.measure, row.policy.final) for row in rows}
    if len(sequences.stops) > 1 or sequences.passes.group is not None or len(kinds) > 1:
        return False
    _, final = kinds.pop()
    chosen = all(type(row.request.chooser) is Chooser for row in rows)
    ends = all(row.ends and row.request.chooser.in_passes for row in rows)
    return final and chosen and ends


def _underway(sequences: Sequences, rows: Sequence[Row]) -> Look | None:
    """What the device is at, or has found, for some of `rows`, if these have gone no other way."""
    look = sequences.look
    if look is None:
        return None
    lengths = {id(row): length for row, length in zip(look.rows, look.lengths, strict=True)}
    known = [row for row in rows if id(row) in lengths]
    return look if known and all(len(row.ids) == lengths[id(row)] for row in known) else None


def _begin(sequences: Sequences, rows: Sequence[Row], count: int) -> Look:
    """The first look at some rows: the device is told of them."""
    passes = sequences.passes
    wanted = Wanted("last", True, rows[0].policy.measure, sequences.samples(rows))
    windows = [Window(row.slot, 1, row.ids[-1:]) for row in rows]
    straight = Straight(passes, windows, sequences.starts(0), wanted)
    size = TOKENS, 2, straight.number
    said = torch.zeros(size, dtype=torch.float64, device=passes.device)
    number = min(count, max(row.left for row in rows))
    lengths, lines = [len(row.ids) for row in rows], (Line(said), Line(said))
    return Look([*rows], lengths, number, straight, lines, sequences.rounds).begun()


def _follow(sequences: Sequences, look: Look, rows: Sequence[Row], count: int) -> Look | None:
    """A look behind another at the same rows, where the device was told of nothing else since."""
    left = max(row.left for row in rows) - look.number
    told = sequences.rounds - look.round > 1
    if left <= 0 or told or len(rows) < len(look.rows) or {*rows} != {*look.rows}:
        return None
    lengths = [length + look.number for length in look.lengths]
    number, lines, now = min(count, left), look.lines[::-1], sequences.rounds
    return look._replace(lengths=lengths, number=number, lines=lines, round=now).begun()
