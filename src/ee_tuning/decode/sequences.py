"""Sequences in their slots, and one segment of layers for many of them at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor

from ee_tuning.decode.lookup import TextDrafts
from ee_tuning.decode.pace import Clock, Pace
from ee_tuning.decode.sampling import Chooser, Token, check_evidence
from ee_tuning.decode.settings import Policy
from ee_tuning.errors import UserError
from ee_tuning.exit_config import LOOKUP
from ee_tuning.passes.chains import Link
from ee_tuning.passes.draws import ALL, NOTHING, samples_of
from ee_tuning.passes.noise import Seeds
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.prompts import read as read_prompts
from ee_tuning.passes.wanted import Prediction, Read, Wanted, Window

Stopwatch = Callable[[], float | None]  # see `Sequences.stopwatch`
Settled = tuple["Row", list[Token]]


def never(ids: Sequence[int], length: int) -> bool:
    """No text ends."""
    return False


@dataclass(eq=False)
class Request:
    """A prompt and how to go on from it.

    max_length: tokens with the prompt's, at most. stops: whether a text ends with the first so many
    of its ids. cancelled: it is given up. finished: its last token has come, or it failed, for the
    reason `error`.
    """

    ids: list[int]
    policy: Policy
    max_length: int
    chooser: Chooser = field(default_factory=Chooser)
    stops: Callable[[Sequence[int], int], bool] = never
    cancelled: bool = False
    finished: bool = False
    error: Exception | None = None


class Row:
    """A sequence in progress, in its slot.

    through: of the segments that are here, how many it goes through. ends: whether it ends behind
    the last of these. ids: prompt, settled tokens, drafts. done: per segment, how many of them it
    has computed. door: the segment it stands before. pending: tokens that left since the last one
    that went to the end; limit: how many may; pace: sets it, if they are drafts. asks: what follows
    the newest token is not known yet. linked: how many settled tokens the draft exit has computed.
    text: the drafts that its text has, if it may.
    """

    def __init__(self, request: Request, slot: int, through: int, ends: bool) -> None:
        self.request, self.slot, self.through, self.ends = request, slot, through, ends
        self.policy = request.policy.start()
        self.ids = list(request.ids)
        self.done = [len(self.ids)] * through
        self.door = 0
        self.drafts: list[Token] = []
        self.pace: Pace | None = None
        self.limit = self.policy.max_pending
        self.pending = 0
        self.asks = True
        self.linked = len(self.ids)
        self.text = TextDrafts(self.policy.max_pending) if self.policy.lookup else None

    @property
    def begins(self) -> bool:
        """Whether it is about to begin a round."""
        return self.door == 0 and not self.pending

    def is_last(self, i: int) -> bool:
        """Whether the sequence ends behind segment `i`."""
        return self.ends and i == self.through - 1

    def window(self, i: int) -> Window:
        """What segment `i` has not computed yet."""
        first = self.done[i]
        if i:
            return Window(self.slot, self.done[i - 1] - first)
        return Window(self.slot, len(self.ids) - first, self.ids[first:])

    def wanted(self, i: int, layer: int) -> int:
        """What follows how many of its newest tokens is asked for behind segment `i`, at `layer`:
        at the end of every draft and of the token before them."""
        if not self.asks:
            return 0
        if self.is_last(i):
            return len(self.drafts) + 1
        return int(layer in self.policy.thresholds and self.pending < self.limit)

    def evident(self, found: Iterable[Sequence[float]]) -> Iterator[Sequence[float]]:
        """Of `found` for its next tokens, confidences last, what comes before a token for which
        nothing speaks. If that is the first one, the request fails; else what came is settled."""
        for number, one in enumerate(found):
            try:
                check_evidence(one[-1])
            except UserError as error:
                if not number:
                    self.request.error = error
                return
            yield one

    def leave(self, token: Token) -> None:
        """Go on with a token that has left at an exit."""
        self.ids.append(token.id)
        self.door, self.pending = 0, self.pending + 1
        if self.policy.verifies:
            self.drafts.append(token)

    def keep(self, kept: int, own: int) -> None:
        """Go on with the first `kept` drafts and the end's `own` token after them."""
        first = len(self.ids) - len(self.drafts)
        self.ids[first + kept :] = [own]
        self.done = [min(done, len(self.ids) - 1) for done in self.done]
        self.door, self.pending, self.drafts = 0, 0, []

    def link(self) -> Link:
        """The settled tokens that the draft exit has not computed yet, and what may follow."""
        return Link(self.slot, self.linked, self.ids[self.linked :], self.limit)

    def draft(self, drafts: list[Token]) -> None:
        """Go on with a chain of drafts that has gone to the end, after the tokens of `link`."""
        self.linked, self.drafts = len(self.ids), drafts
        self.ids += [draft.id for draft in drafts]
        self.done = [len(self.ids)] * self.through

    def chain(self, ids: Sequence[int]) -> None:
        """Go on with the drafts of a chain that the end has kept, and its own token after these: as
        `draft` and `keep`."""
        self.linked = len(self.ids)
        self.ids += ids
        self.done = [len(self.ids) - 1] * self.through

    def look_up(self, found: list[int]) -> None:
        """Go on with drafts from its text, and ask no exit, until the end has verified them."""
        # How sure the end is of those that it keeps, it says then.
        self.drafts = [Token(token, LOOKUP, 0.0) for token in found]
        self.ids += found
        self.limit, self.pending = 0, len(found)

    def learn(self, drafts: Sequence[Token], kept: int) -> None:
        """Of the drafts of a round so many were kept."""
        looked = len(drafts) if drafts and drafts[0].exit_layer == LOOKUP else 0
        if self.text is not None:
            self.text.learn(looked, looked, kept if looked else 0)
        if self.pace is not None:
            self.pace.learn(self.limit, 0 if looked else len(drafts), 0 if looked else kept)

    @property
    def left(self) -> int:
        """How many tokens more it may have."""
        return self.request.max_length - len(self.ids)

    def within(self, drafts: int) -> int:
        """How many of so many drafts it may have in a round: one token more follows them."""
        return max(0, min(drafts, self.policy.max_pending, self.left - 1))


class Sequences:
    """The rows of an engine, or of a stage of one, and the passes that they go through.

    stops: the layer at which each segment ends.
    """

    def __init__(self, passes: Passes, exit_layers: Sequence[int], max_pending: int) -> None:
        """exit_layers: those that any request may use. max_pending: the largest of any request."""
        self.passes, self.exit_layers, self.max_pending = passes, list(exit_layers), max_pending
        self.stops = [segment.stop for segment in passes.segments]
        self.rows: list[Row | None] = [None] * passes.slots
        self._clocks: dict[tuple[int, float], Clock] = {}
        # When the last round was over, and how much was captured by then, unless there was a pause.
        self._over: tuple[float, int] | None = None

    @property
    def live(self) -> list[Row]:
        """The rows in progress, by slot."""
        return [row for row in self.rows if row is not None]

    @property
    def free_slots(self) -> list[int]:
        """Slots without a row."""
        return [slot for slot, row in enumerate(self.rows) if row is None]

    def enter(self, request: Request, slot: int, seeds: Seeds | None = None) -> Row:
        """A row for a request, in a free slot; seeds: for its samples, if it brings none."""
        end = request.policy.end
        through = 0
        if end > self.passes.segments[0].start:
            through = min(sum(stop < end for stop in self.stops) + 1, len(self.stops))
        ends = through > 0 and end <= self.stops[-1]
        row = self.rows[slot] = Row(request, slot, through, ends)
        if row.policy.bar is not None:
            assert self.passes.chains is not None
            self.passes.chains.set_bar(slot, row.policy.bar)
        chooser = request.chooser
        if chooser.sample and chooser.seed is None:
            assert seeds is not None
            chooser.seed = seeds.next()
        self.passes.draws.set(slot, chooser.seed if chooser.sample else None, chooser.warp)
        return row

    def free(self, row: Row) -> None:
        """Its slot may have the next one."""
        if row.request.error is not None:
            self.passes.forget(row.slot)
        self.rows[row.slot] = None
        if not self.live:
            self.pause()

    def clear(self) -> None:
        """Give up every row."""
        self.rows = [None] * len(self.rows)
        self.pause()

    def pause(self) -> None:
        """What comes between the last round and the next one is part of neither."""
        self._over = None

    def read(
        self, rows: Sequence[Row], hidden: Tensor | None = None
    ) -> Iterator[list[tuple[Row, Read]]]:
        """Read the prompts of new rows, those that want the same together; gives those that end
        with a pass, good until the next are given.

        hidden: of the one row there is, what the stage before gave, (P, H).
        """

        def kind(row: Row) -> tuple[int, str, bool]:
            return row.through, row.policy.measure, row.policy.final

        self.passes.draws.tell()
        for (through, measure, final), group in groupby(sorted(rows, key=kind), key=kind):
            alike = {row.slot: row for row in group}
            ends = through > 0 and next(iter(alike.values())).ends
            # Not row.ids, which grow while others are still read.
            inputs: dict[int, list[int] | Tensor] = {
                slot: row.request.ids if hidden is None else hidden for slot, row in alike.items()
            }
            wanted = Wanted("nothing", False, measure)
            if ends:
                wanted = Wanted("last", final, measure, self.samples(alike.values()))
            for reads in read_prompts(self.passes, inputs, through - 1, wanted, self.starts):
                yield [(alike[read.slot], read) for read in reads]

    def advance(self, i: int, rows: Sequence[Row]) -> Iterator[list[tuple[Row, Prediction]]]:
        """Rows that stand before segment `i` go through it, those that want the same together.

        Gives those of a pass that asked, with what follows their newest tokens, good until the next
        are given.
        """

        def kind(row: Row) -> tuple[str, bool]:
            return row.policy.measure, row.is_last(i) and row.policy.final

        for (measure, final), group in groupby(sorted(rows, key=kind), key=kind):
            alike = list(group)
            asked = [row.wanted(i, self.stops[i]) for row in alike]
            after = ("nothing", "last", "each")[min(max(asked), 2)]
            windows = [row.window(i) for row in alike]
            samples = self.samples(alike) if max(asked) else NOTHING
            wanted = Wanted(after, final, measure, samples)
            found = self.passes.window(i, windows, self.starts(i), wanted)
            for row, window in zip(alike, windows, strict=True):
                row.done[i] += window.count
                row.door = i + 1
            if found is not None:
                yield [
                    (row, found.of(j, windows[j].count - 1))
                    for j, row in enumerate(alike)
                    if asked[j]
                ]

    def next_door(self, rows: Sequence[Row]) -> int:
        """The door that is to be opened for those of `rows` that stand there.

        Where no row is alone, a pass takes about as long for few as for many: as long as reading
        the weights of its layers. So it is the door behind which most tokens a layer are to be had,
        if all that stand there or deeper go on to the end, but for texts that end before it:
        neither is the last one waited for that still leaves, nor does anyone go deep while most
        leave. Where all verify it is the shallowest: who begins together verifies together.
        """
        doors = sorted({row.door for row in rows})
        if all(row.policy.verifies for row in rows):
            return doors[0]

        deepest = max(row.through for row in rows)
        deep = [row for row in rows if row.through == deepest]

        def tokens_a_layer(door: int) -> float:
            layers = self.stops[-1] - (self.stops[door - 1] if door else 0)
            return sum(row.door >= door for row in deep) / layers

        return max(doors, key=tokens_a_layer)

    def samples(self, rows: Iterable[Row]) -> int:
        """What a pass of these does to choose their tokens; see `ee_tuning.passes.draws`."""
        needed = {row.request.chooser.samples for row in rows}
        return needed.pop() if len(needed) == 1 else samples_of(needed)

    def drawn(self, rows: Iterable[Row]) -> int:
        """What a chain of these does to choose drafts, which need not be of those that may come."""
        return ALL if any(row.request.chooser.sample for row in rows) else NOTHING

    def clock(self, number: int, cost: float) -> Clock:
        """How long rounds of so many rows take, or of about as many, whose drafts cost so much."""
        key = (number - 1).bit_length(), cost
        if key not in self._clocks:
            sizes = self.passes.sizes.windows[1:] if self.passes.compile and number > 1 else []
            # Ranks that share a pass have to plan the same.
            timed = self.passes.group is None
            self._clocks[key] = Clock(cost, timed, [size - 1 for size in sizes])
        return self._clocks[key]

    def stopwatch(self) -> Stopwatch:
        """What tells the seconds that a round has taken that begins now; None, if something was met
        for the first time, and compiled, meanwhile.

        To hand out what the round before it gave is part of it: where the host limits, that counts
        as much.
        """
        graphs = self.passes.graphs
        start, captured = self._over or (time.perf_counter(), len(graphs))
        self._over = None

        def seconds() -> float | None:
            self._over = time.perf_counter(), len(graphs)
            return self._over[0] - start if len(graphs) == captured else None

        return seconds

    def catch_up(self, rows: Sequence[Row], drafts: bool) -> None:
        """Let the draft exit compute what it has not, where that is more than its next window has.

        drafts: that is now. Else it waits as long as what the exit reads is kept, since a long
        window takes about as long as a short one.
        """
        # What is kept is that of the longest window; a round may add as many as `most`.
        most, longest = self.passes.most, self.passes.longest
        late = [row for row in rows if len(row.ids) - row.linked > most]
        bound = most if drafts else max(most, longest - most)
        if not any(len(row.ids) - row.linked > bound for row in late):
            return
        assert self.passes.chains is not None
        links = [Link(row.slot, row.linked, row.ids[row.linked : -1][:longest]) for row in late]
        self.passes.chains.fill(links, self.starts(0))
        for row, link in zip(late, links, strict=True):
            row.linked += len(link.ids)

    def starts(self, i: int) -> list[int]:
        """For every slot, how many tokens segment `i` has computed."""
        return [row.done[i] if row and i < row.through else 0 for row in self.rows]

    def check(self, request: Request, capacity: int | None = None) -> None:
        """Refuse what this was not made for.

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
        if LOOKUP in missing:
            raise UserError(
                "lookup is off for all prompts, and this one asks for it: turn it on there, too"
            )
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
