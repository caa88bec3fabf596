"""Rounds of drafts of one text, each begun before the host has looked at the one before it.

Where a text is alone, and drafts by a draft exit, the device knows what the next round begins with:
it sees which drafts are those of the end, and what is settled is the next chain's window. So it
need not wait for the host, which reads a round while the next one is *under way*. A chain ends on
the device, too: drafts are branches of one graph. `drafts.chain_round` is the twin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ee_tuning.decode.cache import SlotCache
from ee_tuning.decode.chains import Chains, Found, Step, Tables, first_draft, later_draft
from ee_tuning.decode.graphs import compiled
from ee_tuning.decode.passes import Passes
from ee_tuning.decode.sampling import Token
from ee_tuning.decode.sequences import Row
from ee_tuning.decode.wanted import Prediction, Predictions, Wanted
from ee_tuning.exit_config import DRAFT

# The drafts of a round, and what the end says to each and to what follows the last one.
Verified = tuple[list[Token], list[Prediction]]
NO_LOGITS = torch.empty(0)  # those of a round are not kept


class Key(NamedTuple):
    """Rounds that are alike.

    sizes: length and reach of the pass to the end, and whether its slots are in order. samples: how
    drafts, and what the end says, are drawn.
    """

    name: str
    sizes: tuple[int, int, bool]
    measure: str
    samples: tuple[int, int]


class Line:
    """A copy of what a round says, on its way to the host while the device goes on."""

    def __init__(self, said: Tensor) -> None:
        self._said, on_gpu = said, said.is_cuda
        self._copy = torch.zeros(said.shape, pin_memory=on_gpu)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self._seconds = 0.0

    def follow(self, run: Callable[[], None]) -> Line:
        """Run a round, and take a copy behind it: itself."""
        start = time.perf_counter()
        if self._events:
            self._events[0].record()
        run()
        self._copy.copy_(self._said, non_blocking=True)
        if self._events:
            self._events[1].record()
        self._seconds = time.perf_counter() - start
        return self

    def read(self) -> tuple[list[float], float]:
        """What the round said, waited for, and the seconds that it took the device."""
        if self._events:
            start, end = self._events
            end.synchronize()
            self._seconds = start.elapsed_time(end) / 1000
        found: list[float] = self._copy.tolist()
        return found, self._seconds


@dataclass
class Underway:
    """A round that the device is at.

    length: of the row's text where the round begins, as far as that is known. limit: its drafts at
    most. line: where it is read.
    """

    row: Row
    length: int
    limit: int
    line: Line


class Rounds:
    """One row of an engine with a draft exit, as long as it is the only one."""

    def __init__(self, passes: Passes, chains: Chains) -> None:
        self.passes, self.chains = passes, chains
        self.most = passes.most - 1  # drafts of a round
        width, device = chains.exit.first.weight.shape[0], passes.device
        self._drafts = torch.zeros(1, self.most, dtype=torch.int64, device=device)
        self._sures = torch.zeros(1, self.most, device=device)
        self._hidden = torch.zeros(1, 1, width, dtype=passes.dtype, device=device)
        self._goes_on = torch.zeros(1, dtype=torch.float64, device=device)
        # How many drafts, these, confidences; tokens and confidences of the end. Tokens are exact
        # in fp32 up to 2²⁴.
        self._said = torch.zeros(3 + 4 * self.most, device=device)
        self._lines = [Line(self._said) for _ in range(2)]
        self._underway: Underway | None = None
        self._first = compiled(_first, passes.compile)
        self._later = compiled(_later, passes.compile)
        self._settle = compiled(_settle, passes.compile)

    def underway(self, row: Row) -> bool:
        """Whether the device is at the round that follows what is known of a row."""
        one = self._underway
        return one is not None and one.row is row and one.length == len(row.ids)

    @torch.inference_mode()
    def go_on(self, row: Row, drawn: int) -> tuple[Verified, float]:
        """The next round of a row, and its seconds; sets `row.limit` to its drafts at most.

        `row.limit` was for the round that begins now: that one, or where it is under way already,
        the one behind it. drawn: how drafts are drawn, see `draws`.
        """
        limit, samples = row.limit, (drawn, row.request.chooser.samples)
        # A text's first round is looked at before there is another: many are of a few tokens.
        goes_on = row.text is None and row.linked > len(row.request.ids)
        if not self.underway(row):
            self._underway = self._begin(row, limit, samples)
        one = self._underway
        assert one is not None
        # Not beyond the end, whatever is kept of this one.
        limit = min(limit, row.left - one.limit - 2)
        behind = self._behind(one, limit, samples) if goes_on and limit > 0 else None
        said, seconds = one.line.read()
        found = self._read(said)
        if behind is not None:
            behind.length += kept_of(*found) + 1
        self._underway, row.limit = behind, one.limit
        return found, seconds

    def _begin(self, row: Row, limit: int, samples: tuple[int, int]) -> Underway:
        """A row's next round."""
        chains, link = self.chains, row.link()
        ids = [*link.ids, *[0] * (self.passes.most - len(link.ids))]
        told = torch.tensor([[row.slot, link.first, len(link.ids), limit, *ids]])

        def begin() -> None:
            chains.table[:1, : told.shape[1]].copy_(told, non_blocking=True)

        end = len(row.ids) + limit + 1
        run = self._round(self._key(row.slot, end, row.policy.measure, samples), begin)
        begin()
        return Underway(row, len(row.ids), limit, self._lines[0].follow(run))

    def _behind(self, one: Underway, limit: int, samples: tuple[int, int]) -> Underway | None:
        """The round behind `one`, of up to `limit` drafts; none, where it is to be captured first:
        what it begins with is not known here."""
        row = one.row
        end = len(row.ids) + one.limit + 1 + limit + 1
        key = self._key(row.slot, end, row.policy.measure, samples)
        if key not in self.passes.graphs:
            return None
        if limit != one.limit:
            self.chains.table[:1, 3].fill_(limit)
        (line,) = (line for line in self._lines if line is not one.line)
        return Underway(row, len(row.ids), limit, line.follow(self._round(key, lambda: None)))

    def _read(self, said: list[float]) -> Verified:
        """What `_said` says."""
        made, most = int(said[0]), self.most
        tokens, sures = said[1 : 1 + most], said[1 + most : 1 + 2 * most]
        ends, confidences = said[1 + 2 * most : 2 + 3 * most], said[2 + 3 * most :]
        drafts = [Token(int(tokens[j]), DRAFT, sures[j]) for j in range(made)]
        answers = Predictions(NO_LOGITS, [ends], [confidences], [0])
        return drafts, [answers.at(0, place) for place in range(made + 1)]

    def _key(self, slot: int, end: int, measure: str, samples: tuple[int, int]) -> Key:
        """What a round is of the text in `slot`, which is no longer than `end` behind it. samples:
        how drafts, and what the end says, are drawn."""
        passes, sizes = self.passes, self.passes.sizes
        length = sizes.length(passes.most) if passes.compile else passes.most
        reach = sizes.reach(end + length)
        # Not compiled, the first position would be looked at on the host.
        in_order = passes.compile and passes.in_order([slot])
        return Key("rounds", (length, reach, in_order), measure, samples)

    def _round(self, key: Key, begin: Callable[[], Any]) -> Callable[[], None]:
        """What runs a round. begin: sets what it begins with, where it is to be captured."""
        passes, (_, reach, in_order) = self.passes, key.sizes
        step = Step(reach, in_order, self.chains.limit, key.measure, key.samples[0])
        drafts = [[partial(self._draft, number, step)] for number in range(self.most)]
        wanted = Wanted("each", True, key.measure, key.samples[1])
        verify = partial(self._verify, key.sizes, wanted)
        return passes.graphs.branched(key, drafts, self._goes_on, begin, False, verify)

    def _draft(self, number: int, step: Step) -> None:
        """One more draft after so many."""
        chains, tables = self.chains, self._tables
        kept = Kept(self._drafts, self._sures, self._hidden, self._goes_on)
        if number:
            self._later(chains.twin, chains.cache, tables, kept, chains.numbers[number], step)
        else:
            self._first(chains.twin, chains.cache, tables, kept, step)

    def _verify(self, to: tuple[int, int, bool], wanted: Wanted) -> None:
        """The drafts' pass to the end, of so many tokens, reach and order."""
        passes, tables = self.passes, self._tables
        made = self.chains.tell(tables, passes.control, self._drafts, self._sures)
        last, nothing = len(passes.segments) - 1, Wanted("nothing", False)
        for i in range(last + 1):
            found = passes.forward(i, 1, *to, wanted if i == last else nothing)
        drafts = self._drafts, self._sures
        self._settle(self._said, tables.table, made, *drafts, found[1])

    @property
    def _tables(self) -> Tables:
        return self.chains.tables(1, self.passes.most)

    def to_warm(
        self, measures: Sequence[str], samples: Sequence[tuple[int, int]]
    ) -> list[Callable[[], Any]]:
        """What captures all that texts ask for; see `Ahead.to_warm`."""
        ends = self.passes.sizes.ends(self.passes.most)
        return [partial(self._warm, *one) for one in product(samples, measures, ends)]

    def _warm(self, samples: tuple[int, int], measure: str, end: int) -> None:
        table = self.chains.table
        told = torch.zeros_like(table[:1])
        told[:, 2:4] = 1

        def begin() -> None:
            table[:1] = told

        self._round(self._key(0, end, measure, samples), begin)


class Kept(NamedTuple):
    """What is kept of a chain from one draft to the next.

    drafts, sures: (1, k). hidden: (1, 1, H), of the last one. goes_on: (1,), whether one follows.
    """

    drafts: Tensor
    sures: Tensor
    hidden: Tensor
    goes_on: Tensor

    def take(self, found: Found, number: Tensor | int, tables: Tables) -> None:
        """Take in draft `number`, behind which there are none yet."""
        index = torch.arange(self.drafts.shape[1], device=self.drafts.device)
        sures = torch.where(index < number, self.sures, 0).where(index != number, found[1])
        certain = sures.where(index <= number, 1).prod(1)
        slots, limits = tables.table[:, 0], tables.table[:, 3]
        self.goes_on.copy_((certain >= tables.bars[slots]) & (limits > number + 1))
        self.drafts.copy_(self.drafts.where(index != number, found[0]))
        self.sures.copy_(sures)
        self.hidden.copy_(found[2])


def _first(exit: Any, cache: SlotCache, tables: Tables, kept: Kept, step: Step) -> None:
    """Make the first draft."""
    found = first_draft(exit, cache, tables, step)
    assert found is not None
    kept.take(found, 0, tables)


def _later(
    exit: Any, cache: SlotCache, tables: Tables, kept: Kept, number: Tensor, step: Step
) -> None:
    """Make one more draft after so many."""
    token = kept.drafts.gather(1, (number - 1).expand(1, 1))[:, 0]
    kept.take(later_draft(exit, cache, tables, (number, token, kept.hidden), step), number, tables)


def kept_of(drafts: Sequence[Token], said: Sequence[Prediction]) -> int:
    """How many drafts are what the end says in their places, none before them being wrong."""
    right = [draft.id == one.token for draft, one in zip(drafts, said, strict=False)]
    return [*right, False].index(False)


def _settle(
    said: Tensor, table: Tensor, made: Tensor, drafts: Tensor, sures: Tensor, answers: Tensor
) -> None:
    """Keep the drafts that the end agrees with, and say what there was in this round.

    said: (3 + 4k,). table: (1, 4 + tokens), of `Chains`, for the next one. made: (1,), how many of
    drafts (1, k) there are. answers: (2, 1, T), T > k.
    """
    most = drafts.shape[1]
    tokens, sure = answers[0, :, : most + 1], answers[1, :, : most + 1]
    said.copy_(torch.cat([made[:, None].float(), drafts.float(), sures, tokens, sure], 1)[0])
    index = torch.arange(most, device=said.device)
    same = (tokens[:, :most].long() == drafts) & (index < made)
    kept = same.long().cumprod(1).sum(1)
    own = tokens.long().gather(1, kept[:, None])
    spread = torch.nn.functional.pad(drafts, (0, table.shape[1] - 4 - most))
    settled = torch.where(torch.arange(spread.shape[1], device=said.device) < kept, spread, own)
    first = table[:, 1:2] + table[:, 2:3]
    table.copy_(torch.cat([table[:, :1], first, kept[:, None] + 1, table[:, 3:4], settled], 1))
