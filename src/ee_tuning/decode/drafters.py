"""What drafts on the device for a text that is alone: the draft exit, or an exit at a layer.

Each draft is a step, a branch of the graph of a round, and says whether another one follows. When
there are no more, the pass to the end is told of them. `rounds` runs both.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ee_tuning.decode.alone import APART
from ee_tuning.exit_config import DRAFT
from ee_tuning.passes.cache import SlotCache
from ee_tuning.passes.chains import Chains, Found, Step, Tables, first_draft, later_draft, tell
from ee_tuning.passes.graphs import compiled
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.wanted import Wanted

ENDS = 2  # the variant of a step behind which there are no more


class Key(NamedTuple):
    """Rounds that are alike.

    layer: of the exit that drafts; `LOOKUP`, where the text alone does. sizes: length and reach of
    the pass to the end, and whether its slots are in order. samples: how drafts, and what the end
    says, are drawn.
    """

    name: str
    layer: int
    sizes: tuple[int, int, bool]
    measure: str
    samples: tuple[int, int]


class Drafts(NamedTuple):
    """Those of the round in progress.

    table: (1, 4 + T) int64, as of `Chains`: the row's slot, the first position of the tokens that
    were settled last, their number, drafts at most, and these tokens. tokens, sures: (1, k).
    goes_on: (1,) fp64, the variant of the step that follows, or none. threshold: (1,) fp64, how
    sure an exit at a layer must be.
    """

    table: Tensor
    tokens: Tensor
    sures: Tensor
    goes_on: Tensor
    threshold: Tensor


class Drafter(Protocol):
    """variants: of each step of a round, how many there are. first: of the segments that the pass
    to the end goes through."""

    variants: list[int]
    first: int

    def step(self, number: int, variant: int, key: Key, looked: Tensor | None) -> None:
        """The next draft behind so many; variant `ENDS` ends them. looked: (1,), how many the text
        has, in whose place none are wanted."""

    def tell(self) -> Tensor:
        """Tell the pass to the end; gives how many drafts there are, (1,)."""


class ChainDrafter:
    """The draft exit."""

    first = 0

    def __init__(self, passes: Passes, chains: Chains, drafts: Drafts) -> None:
        self.chains, self._drafts, self._control = chains, drafts, passes.control
        self.variants = [1] * drafts.tokens.shape[1]
        self._tables = chains.tables(1, passes.most)
        width, like = chains.exit.first.weight.shape[0], drafts.sures
        self._hidden = torch.zeros(1, 1, width, dtype=passes.dtype, device=like.device)
        self._first = compiled(_first, passes.compile)
        self._later = compiled(_later, passes.compile)

    def step(self, number: int, variant: int, key: Key, looked: Tensor | None) -> None:
        """As of any."""
        chains, tables, (_, reach, in_order) = self.chains, self._tables, key.sizes
        step = Step(reach, in_order, chains.limit, key.measure, key.samples[0])
        _, tokens, sures, goes_on, _ = self._drafts
        kept = Kept(tokens, sures, goes_on, self._hidden, looked)
        if number:
            self._later(chains.twin, chains.cache, tables, kept, chains.numbers[number], step)
        else:
            self._first(chains.twin, chains.cache, tables, kept, step)

    def tell(self) -> Tensor:
        """As of any."""
        tokens, sures = self._drafts.tokens, self._drafts.sures
        made: Tensor = self.chains.tell(self._tables, self._control, tokens, sures)
        return made


class Kept(NamedTuple):
    """What is kept of a chain from one draft to the next.

    drafts, sures: (1, k). goes_on: (1,), whether one follows. hidden: (1, 1, H), of the last one.
    looked: as of `Drafter.step`.
    """

    drafts: Tensor
    sures: Tensor
    goes_on: Tensor
    hidden: Tensor
    looked: Tensor | None

    def take(self, found: Found, number: Tensor | int, tables: Tables) -> None:
        """Take in draft `number`, behind which there are none yet."""
        index = torch.arange(self.drafts.shape[1], device=self.drafts.device)
        sures = torch.where(index < number, self.sures, 0).where(index != number, found[1])
        certain = sures.where(index <= number, 1).prod(1)
        slots, limits = tables.table[:, 0], tables.table[:, 3]
        goes_on = (certain >= tables.bars[slots]) & (limits > number + 1)
        self.goes_on.copy_(goes_on if self.looked is None else goes_on & (self.looked == 0))
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


class LayerDrafter:
    """The exit at a layer: a step computes the newest token, or the last draft, up to there.

    The pass to the end goes on from what these gave. The last draft is computed, too, but the exit
    is not asked behind it.
    """

    def __init__(self, passes: Passes, door: int, drafts: Drafts) -> None:
        """door: the segment behind which the exit is."""
        self.passes, self.first, self._drafts = passes, door + 1, drafts
        most, device = drafts.tokens.shape[1], drafts.tokens.device
        self.variants = [1, *[2] * (most - 1), 1]
        self._made = torch.zeros(1, dtype=torch.int64, device=device)
        self._numbers = torch.arange(most, device=device)[:, None].repeat(1, APART)
        self._tell = compiled(tell, passes.compile)
        self._take = compiled(_take, passes.compile)

    def step(self, number: int, variant: int, key: Key, looked: Tensor | None) -> None:
        """As of any."""
        passes, control, (_, reach, in_order) = self.passes, self.passes.control, key.sizes
        if not number:
            self.tell()
        asks = variant != ENDS and number < len(self.variants) - 1
        nothing = Wanted("nothing", False)
        wanted = Wanted("last", False, key.measure, key.samples[0]) if asks else nothing
        for i in range(self.first):
            last = i == self.first - 1
            found = passes.forward(i, 1, 1, reach, in_order, wanted if last else nothing)
        if asks:
            before = self._numbers[number, :1]
            self._take(self._drafts, self._made, control, found[1], before)

    def tell(self) -> Tensor:
        """As of any."""
        self._tell(self._drafts.table, self.passes.control, self._drafts.tokens)
        return self._made


def _take(drafts: Drafts, made: Tensor, control: Tensor, answers: Tensor, number: Tensor) -> None:
    """Take what an exit says for the draft behind so many, (1,), if it is sure enough and one more
    may be, and tell the next step of it.

    made: (1,), how many drafts there are then. control: of `Passes`. answers: (2, 1, 1).
    """
    table, tokens, sures, goes_on, threshold = drafts
    token, sure = answers[0, :, 0].long(), answers[1, :, 0]
    leaves = (sure.double() >= threshold) & (table[:, 3] > number)
    index = torch.arange(tokens.shape[1], device=tokens.device)
    tokens.copy_(tokens.where(index != number, token))
    sures.copy_(sures.where(index != number, sure))
    made.copy_(number + leaves)
    # The step behind as many as there can be is that which ends in any case.
    ends = (table[:, 3] <= number + 1) & (number + 1 < tokens.shape[1])
    goes_on.copy_(torch.where(leaves, torch.where(ends, ENDS, 1), 0))
    slot, first, count, _ = table[:, :4].unbind(1)
    told = torch.stack([slot, first + count + number, torch.ones_like(slot), token], 1)
    control[:1, :4] = told


def drafters_of(passes: Passes, drafts: Drafts) -> dict[int, Drafter]:
    """What may draft, by the exit's layer."""
    found: dict[int, Drafter] = {}
    if passes.chains is not None:
        found[DRAFT] = ChainDrafter(passes, passes.chains, drafts)
    for door, segment in enumerate(passes.segments[:-1]):
        if segment.stop in passes.exits:
            found[segment.stop] = LayerDrafter(passes, door, drafts)
    return found
