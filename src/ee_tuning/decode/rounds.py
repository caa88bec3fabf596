"""Rounds of drafts of one text, several between two looks of the host.

Where a text is alone, and drafts by a draft exit, the device begins the next round itself: it sees
which drafts are those of the end, and what is settled is the next chain's window. A chain ends on
the device, too: drafts are branches of one graph. `drafts.chain_round` is the twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

ROUNDS = 3  # between two looks: those behind a text's end are lost, and new texts wait

# The drafts of a round, and what the end says to each and to what follows the last one.
Verified = tuple[list[Token], list[Prediction]]


class Rounds:
    """One row of an engine with a draft exit, as long as it is the only one."""

    def __init__(self, passes: Passes, chains: Chains) -> None:
        self.passes, self.chains = passes, chains
        self.most = passes.most - 1  # drafts of a round
        width, device = chains.exit.first.weight.shape[0], passes.device
        self._drafts = torch.zeros(1, self.most, dtype=torch.int64, device=device)
        self._sures = torch.zeros(1, self.most, device=device)
        self._hidden = torch.zeros(1, 1, width, dtype=passes.dtype, device=device)
        self._goes_on = torch.zeros(1, dtype=torch.int32, device=device)
        self._round = torch.zeros(1, dtype=torch.int64, device=device)
        # By round: how many drafts, these, confidences; tokens and confidences of the end. Tokens
        # are exact in fp32 up to 2²⁴.
        self._said = torch.zeros(ROUNDS, 3 + 4 * self.most, device=device)
        self._first = compiled(_first, passes.compile)
        self._later = compiled(_later, passes.compile)
        self._settle = compiled(_settle, passes.compile)

    @torch.inference_mode()
    def go_on(self, row: Row, count: int, drawn: int) -> list[Verified]:
        """The next rounds of a row, up to `count` ≤ `ROUNDS`, of up to `row.limit` drafts each.

        What follows one without a number that speaks for its tokens is left out. drawn: how drafts
        are drawn, see `draws`.
        """
        chains, link, policy = self.chains, row.link(), row.policy
        ids = [*link.ids, *[0] * (self.passes.most - len(link.ids))]
        told = torch.tensor([[row.slot, link.first, len(link.ids), link.limit, *ids]])

        def begin() -> None:
            chains.table[:1, : told.shape[1]].copy_(told, non_blocking=True)
            self._round.zero_()

        end = len(row.ids) + count * (row.limit + 1)
        samples = row.request.chooser.samples
        run = self._rounds(row.slot, end, policy.measure, (drawn, samples), begin)
        begin()
        for _ in range(count):
            run()
        found: list[Verified] = []
        for said in self._said[:count].tolist():  # the one wait for the device
            drafts, answers = self._read(said)
            if found and not all(math.isfinite(one.confidence) for one in answers):
                break
            found.append((drafts, answers))
        return found

    def _read(self, said: list[float]) -> Verified:
        """What a line of `_said` says."""
        made, most = int(said[0]), self.most
        parts = torch.tensor(said[1:]).split([most, most, most + 1, most + 1])
        tokens, sures, ends, confidences = (part.tolist() for part in parts)
        drafts = [Token(int(tokens[j]), DRAFT, sures[j]) for j in range(made)]
        answers = Predictions(torch.empty(0), [ends], [confidences], [0])
        return drafts, [answers.at(0, place) for place in range(made + 1)]

    def _rounds(
        self, slot: int, end: int, measure: str, samples: tuple[int, int],
        begin: Callable[[], Any],
    ) -> Callable[[], None]:  # fmt: skip
        """What runs a round of the text in `slot`, which is no longer than `end` before the next
        look. samples: how drafts, and what the end says, are drawn. begin: sets the state."""
        passes, sizes = self.passes, self.passes.sizes
        length = sizes.length(passes.most) if passes.compile else passes.most
        reach = sizes.reach(end + length) if passes.compile else end + length
        # Not compiled, the first position would be looked at on the host.
        in_order = passes.compile and passes.in_order([slot])
        step = Step(reach, in_order, self.chains.limit, measure, samples[0])
        drafts = [partial(self._draft, number, step) for number in range(self.most)]
        to, wanted = (length, reach, in_order), Wanted("each", True, measure, samples[1])
        verify = partial(self._verify, to, wanted)
        key = "rounds", to, measure, samples
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
        self._settle(self._said, self._round, tables.table, made, *drafts, found[1])

    @property
    def _tables(self) -> Tables:
        return self.chains.tables(1, self.passes.most)

    @torch.inference_mode()
    def warm_up(self, measures: Sequence[str], samples: tuple[int, int]) -> None:
        """Capture what texts ask for; see `Ahead.warm_up`."""
        chains = self.chains
        told = torch.zeros_like(chains.table[:1])
        told[:, 2:4] = 1

        def begin() -> None:
            chains.table[:1] = told
            self._round.zero_()

        for measure, end in product(measures, self.passes.sizes.ends(self.passes.most)):
            self._rounds(0, end, measure, samples, begin)


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


def _settle(
    said: Tensor, round: Tensor, table: Tensor, made: Tensor, drafts: Tensor, sures: Tensor,
    answers: Tensor,
) -> None:  # fmt: skip
    """Keep the drafts that the end agrees with, and say what there was in this `round` (1,).

    said: (rounds, 3 + 4k). table: (1, 4 + tokens), of `Chains`, for the next one. made: (1,), how
    many of drafts (1, k) there are. answers: (2, 1, T), T > k.
    """
    most = drafts.shape[1]
    tokens, sure = answers[0, :, : most + 1], answers[1, :, : most + 1]
    line = torch.cat([made[:, None].float(), drafts.float(), sures, tokens, sure], 1)
    place = torch.arange(len(said), device=said.device) == round
    said.copy_(torch.where(place[:, None], line, said))
    round.add_(1)
    index = torch.arange(most, device=said.device)
    same = (tokens[:, :most].long() == drafts) & (index < made)
    kept = same.long().cumprod(1).sum(1)
    own = tokens.long().gather(1, kept[:, None])
    spread = torch.nn.functional.pad(drafts, (0, table.shape[1] - 4 - most))
    settled = torch.where(torch.arange(spread.shape[1], device=said.device) < kept, spread, own)
    first = table[:, 1:2] + table[:, 2:3]
    table.copy_(torch.cat([table[:, :1], first, kept[:, None] + 1, table[:, 3:4], settled], 1))
