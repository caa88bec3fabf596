"""Rounds of drafts of several texts, each begun before the host has looked at the one before it.

What `drafts.chain_round`, the twin, asks the host for between two rounds, the device finds itself:
which drafts are those of the end, and so which windows the next chains have. So the host hands
tokens out, and plans, while the device is at the next round: of those rows that go on then, as far
as the host knows, and of others that have come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ee_tuning.decode.rounds import Line, settled
from ee_tuning.decode.sampling import Chooser, Token, check_evidence
from ee_tuning.decode.sequences import Row, Sequences, Settled
from ee_tuning.errors import UserError
from ee_tuning.exit_config import DRAFT
from ee_tuning.passes.chains import Link, filled
from ee_tuning.passes.draws import ALL
from ee_tuning.passes.graphs import compiled
from ee_tuning.passes.wanted import Wanted, handed_on, told


class Underway(NamedTuple):
    """A round that the device is at.

    rows: whose it is. slots: of the rows of its pass. number: drafts of a text at most. ends: by
    slot, how long its text is at most when the round begins. line: where it is read.
    """

    rows: list[Row]
    slots: list[int]
    number: int
    ends: dict[int, int]
    line: Line

    def is_for(self, rows: Sequence[Row], number: int) -> bool:
        """Whether it is a round of these rows, and of so many drafts."""
        return number == self.number and [*rows] == self.rows


class Together:
    """Rows of an engine that draft by its draft exit."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences
        self._passes = passes = sequences.passes
        assert passes.chains is not None
        self._chains = passes.chains
        self._most = passes.most - 1  # drafts of a round
        slots, device = passes.slots, passes.device
        # By slot, how long its text may become; 0 of idle ones that are among a pass's rows.
        self._longest = torch.zeros(slots, dtype=torch.int64, device=device)
        # How many drafts, tokens of drafts, confidences; tokens and confidences of the end.
        self._said = torch.zeros(slots, 3 + 4 * self._most, device=device)
        self._table = self._chains.next_table()
        self._given = self._table.new_zeros(slots, self._table.shape[1] + 2)  # see `_hand_on`
        self._lines = [Line(self._said) for _ in range(2)]
        self._underway: Underway | None = None
        self._follow = compiled(_follow, passes.compile)
        self._hand_on = compiled(_hand_on, passes.compile)

    def serves(self, rows: Sequence[Row]) -> bool:
        """Whether these rows draft by the draft exit alone, and passes choose."""
        if len(rows) < 2 or len({row.policy.measure for row in rows}) > 1:
            return False
        drafting = all(row.policy.bar is not None and row.text is None for row in rows)
        choosers = [row.request.chooser for row in rows]
        chosen = all(type(one) is Chooser and one.in_passes for one in choosers)
        return drafting and chosen and all(row.begins and row.ends for row in rows)

    def underway(self, rows: Sequence[Row]) -> bool:
        """Whether the device is at the next round of some of `rows`, or has found it."""
        return self._underway is not None and any(row in self._underway.rows for row in rows)

    @torch.inference_mode()
    def go_on(self, rows: Sequence[Row], behind: bool) -> tuple[list[Settled], float]:
        """The next round of rows that this `serves`, of up to `row.limit` drafts each, or the one
        that is `underway`, as of `drafts.chain_round`; and the seconds that it took the device.

        behind: the one that they have next is begun before the host looks at this one. Rows that
        have come while the device is at it wait for that.
        """
        number = max(row.limit for row in rows)
        one = self._underway if self.underway(rows) else None
        one = one or self._begin(rows, number, None)
        # Of others, or of other drafts, only where no pass writes to idle slots.
        apart = self._passes.sizes.apart
        follows = one.is_for(rows, number) or (apart and self.serves(rows))
        self._underway = self._begin(rows, number, one) if behind and follows else None
        said, seconds = one.line.read()
        seen, places = {*one.rows}, {slot: place for place, slot in enumerate(one.slots)}
        found = [self._settle(row, one, said[places[row.slot]]) for row in rows if row in seen]
        return found, seconds

    def _begin(self, rows: Sequence[Row], number: int, before: Underway | None) -> Underway:
        """A round of `rows` and up to so many drafts, behind another, if there is one."""
        ends, slots = {row.slot: len(row.ids) for row in rows}, list[int]()
        seen = set[Row]()
        if before is not None:
            slots, seen = before.slots, {*rows}.intersection(before.rows)
            for row in seen:  # a text that is as long as it may become stays as it was
                end = before.ends[row.slot] + before.number + 1
                ends[row.slot] = min(end, row.request.max_length)
        starts = [ends.get(slot, start) for slot, start in enumerate(self._sequences.starts(0))]
        if before is None or not before.is_for(rows, number):
            slots = self._tell_windows(rows, seen, slots, number, starts)
        line = self._lines[before is not None and before.line is self._lines[0]]
        line.follow(partial(self._round, rows, slots, number, starts))
        return Underway([*rows], slots, number, ends, line)

    def _tell_windows(
        self, rows: Sequence[Row], seen: Collection[Row], slots: Sequence[int], number: int,
        starts: Sequence[int],
    ) -> list[int]:  # fmt: skip
        """Tell the device of the windows of the next chains; gives the slots of their rows.

        seen: those of which the device finds them itself, among the rows of the last ones, which
        are of `slots`.
        """
        passes = self._passes
        links = [Link(row.slot, 0, ()) if row in seen else row.link() for row in rows]
        by_slot, where = {row.slot: row for row in rows}, {one: at for at, one in enumerate(slots)}
        length, table = self._chains.window, []
        every = filled(links, starts, passes.sizes if passes.compile else None, length)
        for place, link in enumerate(every):
            row, ids = by_slot.get(link.slot), [*link.ids, *[0] * (length - len(link.ids))]
            longest = 0 if row is None else row.request.max_length
            most = number if row is None else min(number, row.policy.max_pending)
            known = len(every) + where[link.slot] if row in seen else place
            table.append([longest, link.slot, link.first, len(link.ids), most, *ids, known])
        self._given[: len(table)].copy_(told(table), non_blocking=True)
        self._run(("windows", len(table)), self._windows)
        return [link.slot for link in every]

    def _windows(self, rows: int) -> None:
        """Let the next chains be of so many rows, of windows that are given or there."""
        self._hand_on(self._table, self._given[:rows], self._longest)

    def _round(
        self, rows: Sequence[Row], slots: list[int], number: int, starts: Sequence[int]
    ) -> None:
        """The next one of `slots`, whose windows are told."""
        sequences, sizes, compile = self._sequences, self._passes.sizes, self._passes.compile
        measure, drawn = rows[0].policy.measure, sequences.drawn(rows)
        reach = max(starts[slot] for slot in slots) + self._chains.window
        size = len(slots), sizes.reach(reach) if compile else reach, sizes.in_order(slots)
        key = *size, number, measure, drawn, sequences.samples(rows)
        self._run(("together", *key), self._forward)

    def _run(self, key: tuple[Any, ...], function: Callable[..., None]) -> None:
        """A function, of what a key has behind its name, as a graph where there are graphs. So
        passes have one `Together`."""
        run, passes = partial(function, *key[1:]), self._passes
        passes.graphs.run(key, run, moved=[self._table]) if passes.compile else run()

    def _forward(
        self, rows: int, reach: int, in_order: bool, number: int, measure: str, drawn: int,
        samples: int,
    ) -> None:  # fmt: skip
        """Chains, what the end says to them, and the windows of the next ones."""
        passes, chains = self._passes, self._chains
        size = rows, chains.window, number, reach, in_order
        said = chains.forward(*size, measure, drawn, self._most)
        length = passes.sizes.length(1 + number, rows) if passes.compile else 1 + number
        wanted = Wanted("each", True, measure, samples)
        _, answers = passes.to_end(0, (rows, length, reach, in_order), wanted)
        self._follow(self._said, self._table[:rows], said, answers, self._longest)

    def _settle(self, row: Row, one: Underway, said: list[float]) -> Settled:
        """What a round says of a row, which goes on with it; its text drafts nothing by itself."""
        most, number = self._most, int(said[0])
        drafts, ends, sures = said[1 : 1 + number], said[1 + 2 * most :], said[2 + 3 * most :]
        kept = next((at for at, id in enumerate(drafts) if id != ends[at]), number)
        try:
            for sure in sures[: kept + 1]:
                check_evidence(sure)
        except UserError as error:
            row.request.error = error
            return row, []
        ids = [*map(int, ends[: kept + 1])]
        pairs = zip(ids[:kept], said[1 + most :], strict=False)
        tokens = [Token(id, DRAFT, sure) for id, sure in pairs]
        rejected = [*map(int, drafts[kept:])]
        tokens.append(Token(ids[-1], row.policy.end, sures[kept], rejected=rejected))
        row.limit = row.within(one.number)
        row.chain(ids)
        if row.pace is not None:
            row.pace.learn(row.limit, number, kept)
        return row, tokens

    def to_warm(self, measures: Sequence[str], samples: Sequence[int]) -> list[Callable[[], Any]]:
        """What captures rounds of every size, and of windows that are given; see
        `ee_tuning.passes.warm`."""
        sizes, numbers = self._passes.sizes, range(1, self._most + 1)
        some = [one for one in sizes.chains(self._chains.window) if one[0] > 1]
        keys: dict[tuple[Any, ...], Callable[..., None]] = {}
        for (rows, reach), number, measure, kind in product(some, numbers, measures, samples):
            size = rows, reach, sizes.in_order(list(range(rows)))
            key = "together", *size, number, measure, min(kind, ALL), kind
            keys |= {key: self._forward, ("windows", rows): self._windows}
        return [self._clear, *(partial(self._run, *one) for one in keys.items())]

    def _clear(self) -> None:
        """Windows of one token at the beginning of each slot, of no texts."""
        self._longest.zero_()
        slots = torch.arange(len(self._table), device=self._table.device)
        for table, slot, number in ((self._table, 0, 2), (self._given, 1, 3)):
            table.zero_()
            table[:, slot], table[:, number] = slots, 1
        self._given[:, -1] = slots


def _hand_on(table: Tensor, given: Tensor, longest: Tensor) -> None:
    """Let windows be of other rows, and of other drafts at most.

    table: (slots, 4 + T), of `Chains`. given: (n, 6 + T), how long a text may become, then as for
    `handed_on`. longest: (slots,), is told of the first, too.
    """
    ends, new = given[:, 0], handed_on(given[:, 1:], table)
    left = ends - new[:, 1] - new[:, 2]
    limits = torch.minimum(given[:, 4], (left - 1).clamp(min=0))
    longest[given[:, 1]] = ends
    table[: len(given)] = torch.cat([new[:, :3], limits[:, None], new[:, 4:]], 1)


def _follow(said: Tensor, table: Tensor, chained: Tensor, answers: Tensor, longest: Tensor) -> None:
    """Say what there was in a round of n rows, and make the windows of the next one.

    said: (slots, 3 + 4k). table: (n, 4 + T), of `Chains`. chained: (n, 1 + 2k), how many drafts
    there are, these, and confidences. answers: (2, n, U), what the end says to each draft of the
    round and to what follows, as long as their windows. longest: (slots,), of texts.
    """
    most = said.shape[1] // 4
    made, drafts, _ = chained.split([1, most, most], 1)
    ends, confidences = torch.nn.functional.pad(answers, (0, most + 1 - answers.shape[2]))
    said[: len(chained)] = torch.cat([chained, ends, confidences], 1)
    new = settled(table, made[:, 0].long(), drafts.long(), ends.long())
    left = (longest[table[:, 0]] - new[:, 1] - new[:, 2])[:, None]
    new[:, 3:4] = torch.minimum(new[:, 3:4], (left - 1).clamp(min=0))
    # Idle slots, and texts that are as long as they may become, stay where they are.
    table.copy_(torch.where(left > 0, new, table))
