"""Rounds of drafts of one text, each begun before the host has looked at the one before it.

Where a text is alone, and one exit drafts, or the text itself, the device knows what the next round
begins with: it sees which drafts are those of the end, and what is settled is the next chain's
window and the text's new end. So it need not wait for the host, which reads a round while the next
one is *under way*. Drafts end on the device, too: they are branches of one graph. What the text has
goes before what the draft exit drafts. `drafts.draft_round`, `drafts.chain_round` and `Lookup` are
the twins, which serve all else: several exits at layers, or one and the text, choosers and policies
with rules of their own, processors that passes cannot do, --tp and --pp, graphs without branches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ee_tuning.decode.drafters import ENDS, Drafts, Key, drafters_of
from ee_tuning.decode.lookup import MATCH, Limits, Looked, look
from ee_tuning.decode.sampling import Token
from ee_tuning.decode.sequences import Row
from ee_tuning.decode.settings import Policy
from ee_tuning.exit_config import DRAFT, LOOKUP
from ee_tuning.passes.chains import tell
from ee_tuning.passes.draws import NOTHING
from ee_tuning.passes.graphs import compiled
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.wanted import Prediction, Predictions, Wanted

NO_LOGITS = torch.empty(0)  # those of a round are not kept


class Line:
    """A copy of what the device says, on its way to the host while the device goes on."""

    def __init__(self, said: Tensor) -> None:
        self.said, on_gpu = said, said.is_cuda
        self._copy = torch.zeros(said.shape, dtype=said.dtype, pin_memory=on_gpu)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self._seconds = 0.0

    def follow(self, run: Callable[[], None]) -> Line:
        """Run something, and take a copy behind it: itself."""
        start = time.perf_counter()
        if self._events:
            self._events[0].record()
        run()
        self._copy.copy_(self.said, non_blocking=True)
        if self._events:
            self._events[1].record()
        self._seconds = time.perf_counter() - start
        return self

    def read(self) -> tuple[list[Any], float]:
        """What was said, waited for, and the seconds that it took the device."""
        if self._events:
            start, end = self._events
            end.synchronize()
            self._seconds = start.elapsed_time(end) / 1000
        return self._copy.tolist(), self._seconds


@dataclass
class Underway:
    """A round that the device is at.

    length: of the row's text where the round begins, as far as that is known. known: that it was
    when the round began. line: where it is read.
    """

    row: Row
    length: int
    limits: Limits
    known: bool
    line: Line


@dataclass
class Round:
    """A round that was read: its drafts, and what the end says to each and to what follows the last
    one.

    limits: what it was begun with. known: whether the text was known then. size: how many of the
    text's last tokens were found again. seconds: that it took the device.
    """

    drafts: list[Token]
    said: list[Prediction]
    limits: Limits
    known: bool
    size: int
    seconds: float


class Rounds:
    """One row of an engine with exits, or for texts that draft, as long as it is the only one."""

    def __init__(self, passes: Passes) -> None:
        self.passes, chains = passes, passes.chains
        most = self.most = passes.most - 1  # drafts of a round
        device, longest = passes.device, passes.sizes.longest

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        # As of `Chains`.
        table = numbers(1, 4 + longest) if chains is None else chains.table[:1]
        self._table = table[:, : 4 + passes.most]
        self._drafts, self._sures = numbers(1, most), torch.zeros(1, most, device=device)
        self._goes_on = torch.zeros(1, dtype=torch.float64, device=device)
        self._threshold = torch.zeros_like(self._goes_on)
        drafts = self._drafts, self._sures, self._goes_on, self._threshold
        self._drafters = drafters_of(passes, Drafts(self._table, *drafts))
        self._looked = Looked(numbers(1), numbers(1), numbers(1, most))
        self._text = numbers(passes.sizes.places if passes.texts else 0)
        self._limits, self._told = numbers(MATCH + 1), Limits()
        self._known: tuple[Row | None, int] = None, 0  # of whose text how much is in `_text`
        # How many drafts, tokens found, drafts, confidences; tokens and confidences of the end.
        # Tokens are exact in fp32 up to 2²⁴.
        self._said = torch.zeros(4 + 4 * most, device=device)
        self._lines = [Line(self._said) for _ in range(2)]
        self._underway: Underway | None = None
        self._look = compiled(look, passes.compile)
        self._prefer = compiled(_prefer, passes.compile)
        self._settle = compiled(_settle, passes.compile)

    def serves(self, policy: Policy) -> bool:
        """Whether a row that `Ahead` serves, of a policy with drafts, drafts as this can."""
        return policy.bar is not None or len(policy.thresholds) + policy.lookup == 1

    def underway(self, row: Row) -> bool:
        """Whether the device is at the round that follows what is known of a row."""
        one = self._underway
        return one is not None and one.row is row and one.length == len(row.ids)

    @torch.inference_mode()
    def go_on(self, row: Row, now: Limits, behind: Limits, drawn: int) -> Round:
        """The next round of a row.

        now: its drafts at most, where it is not under way already. behind: those of the one that
        begins before this one is read; without any there is none. drawn: how an exit's drafts are
        drawn, see `passes.draws`.
        """
        layer, own = _drafts_at(row.policy), row.request.chooser.samples
        samples = _samples(layer, drawn, own)
        if not self.underway(row):
            self._underway = self._begin(row, now, samples)
        one = self._underway
        assert one is not None
        # Not beyond the end, whatever is kept of this one.
        room = row.left - one.limits.most - 2
        if layer > DRAFT and behind.most > room:  # all that leave are wanted, as of `Audited`
            behind = Limits()
        behind = behind.within(room)
        following = self._behind(one, behind, samples) if behind.most else None
        said, seconds = one.line.read()
        found = self._read(said, one, seconds)
        self._known = row, one.length
        if following is not None:
            following.length += kept_of(found.drafts, found.said) + 1
        self._underway = following
        return found

    def _begin(self, row: Row, limits: Limits, samples: tuple[int, int]) -> Underway:
        """A row's next round."""
        length = len(row.ids)
        first = length - 1 if row.policy.bar is None else row.linked
        ids = [*row.ids[first:], *[0] * (self.passes.most - length + first)]
        told = torch.tensor([[row.slot, first, length - first, limits.exit, *ids]])

        def begin() -> None:
            self._table.copy_(told, non_blocking=True)

        if row.text is not None:
            known = self._known[1] if self._known[0] is row else 0
            self._text[known:length].copy_(torch.tensor(row.ids[known:]), non_blocking=True)
        for threshold in row.policy.thresholds.values():
            self._threshold.fill_(threshold)
        self._tell(limits)
        run = self._round(self._key(row, length + limits.most + 1, samples), begin)
        begin()
        return Underway(row, length, limits, True, self._lines[0].follow(run))

    def _behind(self, one: Underway, limits: Limits, samples: tuple[int, int]) -> Underway | None:
        """The round behind `one`; none, where it is to be captured first: what it begins with is
        not known here."""
        row, length = one.row, len(one.row.ids)
        key = self._key(row, length + one.limits.most + 1 + limits.most + 1, samples)
        if key not in self.passes.graphs:
            return None
        self._tell(limits)
        line = self._lines[one.line is self._lines[0]]
        run = self._round(key, lambda: None)
        return Underway(row, length, limits, False, line.follow(run))

    def _tell(self, limits: Limits) -> None:
        """Let rounds from the next one on have so many drafts."""
        if limits == self._told:
            return
        if limits.exit != self._told.exit:
            self._table[:, 3].fill_(limits.exit)
        for size, (limit, told) in enumerate(zip(limits.texts, self._told.texts, strict=True)):
            if limit != told:
                self._limits[size].fill_(limit)
        self._told = limits

    def _read(self, said: list[float], one: Underway, seconds: float) -> Round:
        """What `_said` says of a round."""
        made, size, most = int(said[0]), int(said[1]), self.most
        tokens, sures = said[2 : 2 + most], said[2 + most : 2 + 2 * most]
        ends, confidences = said[2 + 2 * most : 3 + 3 * most], said[3 + 3 * most :]
        if one.limits.texts[size]:  # how sure the end is of those that it keeps, it says
            drafts = [Token(int(tokens[j]), LOOKUP, 0.0) for j in range(made)]
        else:
            layer = _drafts_at(one.row.policy)
            drafts = [Token(int(tokens[j]), layer, sures[j]) for j in range(made)]
        answers = Predictions(NO_LOGITS, [[ends], [confidences]], [0])
        answered = [answers.at(0, place) for place in range(made + 1)]
        return Round(drafts, answered, one.limits, one.known, size, seconds)

    def _key(self, row: Row, end: int, samples: tuple[int, int]) -> Key:
        """What a round is of a row's text, which is no longer than `end` behind it. samples: how
        drafts, and what the end says, are drawn."""
        layer, sizes = _drafts_at(row.policy), self._sizes(row.slot, end)
        return Key("rounds", layer, sizes, row.policy.measure, samples)

    def _sizes(self, slot: int, end: int) -> tuple[int, int, bool]:
        """As of `Key`, of a text in a slot."""
        passes, sizes = self.passes, self.passes.sizes
        length = sizes.length(passes.most, 1) if passes.compile else passes.most
        # Not compiled, the first position would be looked at on the host.
        return length, sizes.reach(end + length), passes.compile and passes.sizes.in_order([slot])

    def _round(self, key: Key, begin: Callable[[], Any]) -> Callable[[], None]:
        """What runs a round. begin: sets what it begins with, where it is to be captured."""
        steps, verify = partial(self._steps, key), partial(self._verify, key)
        return self.passes.graphs.branched(key, steps, self._goes_on, begin, False, verify, ENDS)

    def _steps(self, key: Key) -> list[list[Callable[[], None]]]:
        """The drafts of a round."""
        drafter = self._drafters.get(key.layer)
        counts = [1] if drafter is None else drafter.variants
        return [
            [partial(self._step, number, variant, key) for variant in range(1, count + 1)]
            for number, count in enumerate(counts)
        ]

    def _step(self, number: int, variant: int, key: Key) -> None:
        """What the text has, and one more draft after so many of the exit."""
        texts = self._texts(key)
        if texts and not number:
            reach = key.sizes[1]
            self._look(self._text[:reach], self._table, self._limits, self._looked)
        if (drafter := self._drafters.get(key.layer)) is not None:
            drafter.step(number, variant, key, self._looked.number if texts else None)

    def _verify(self, key: Key) -> None:
        """The drafts' pass to the end."""
        passes, drafts, sures, looked = self.passes, self._drafts, self._sures, self._looked
        made, size, first, drafter = looked.size, looked.size, 0, self._drafters.get(key.layer)
        if drafter is not None:
            made, first = drafter.tell(), drafter.first
        if self._texts(key):
            drafts, made = self._prefer(
                looked, self._table, passes.control, drafts, None if drafter is None else made
            )
        wanted = Wanted("each", True, key.measure, key.samples[1])
        _, answers = passes.to_end(first, (1, *key.sizes), wanted)
        self._settle(self._said, self._table, made, size, drafts, sures, answers)

    def _texts(self, key: Key) -> bool:
        """Whether texts may draft in such rounds."""
        return self.passes.texts and key.layer <= DRAFT

    def to_warm(
        self, measures: Sequence[str], samples: Sequence[tuple[int, int]], layers: bool, texts: bool
    ) -> list[Callable[[], Any]]:
        """What captures all that texts ask for; see `Ahead.to_warm`. layers: whether exits at
        layers draft. texts: whether texts themselves do."""
        ends = self.passes.sizes.ends(self.passes.most)
        drafters = [layer for layer in self._drafters if layers or layer == DRAFT]
        exits = [*drafters, *[LOOKUP] * texts]
        keys: dict[Key, None] = {}
        for layer, (drawn, own), measure, end in product(exits, samples, measures, ends):
            kinds = _samples(layer, drawn, own)
            keys[Key("rounds", layer, self._sizes(0, end), measure, kinds)] = None
        return [partial(self._warm, key) for key in keys]

    def _warm(self, key: Key) -> None:
        told = torch.zeros_like(self._table)
        told[:, 2:4] = 1
        self._round(key, partial(self._table.copy_, told))


def _drafts_at(policy: Policy) -> int:
    """The layer of the exit that drafts; `LOOKUP`, if texts do alone."""
    return DRAFT if policy.bar is not None else next(iter(policy.thresholds), LOOKUP)


def _samples(layer: int, drawn: int, own: int) -> tuple[int, int]:
    """How drafts of a layer are drawn, and what the end says. drawn: how those of the draft exit
    are. own: how the text is."""
    return {DRAFT: drawn, LOOKUP: NOTHING}.get(layer, own), own


def _prefer(
    looked: Looked, table: Tensor, control: Tensor, drafts: Tensor, made: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The text's drafts, where it has some, else an exit's (1, k), of which there are `made` (1,):
    these and their number, of which the pass that verifies is told."""
    made = looked.number if made is None else torch.where(looked.number > 0, looked.number, made)
    drafts = torch.where(looked.number[:, None] > 0, looked.drafts, drafts)
    tell(table, control, drafts)
    return drafts, made


def kept_of(drafts: Sequence[Token], said: Sequence[Prediction]) -> int:
    """How many drafts are what the end says in their places, none before them being wrong."""
    right = [draft.id == one.token for draft, one in zip(drafts, said, strict=False)]
    return [*right, False].index(False)


def _settle(
    said: Tensor, table: Tensor, made: Tensor, size: Tensor, drafts: Tensor, sures: Tensor,
    answers: Tensor,
) -> None:  # fmt: skip
    """Keep the drafts that the end agrees with, and say what there was in this round.

    said: (4 + 4k,). table: (1, 4 + tokens), of `Chains`, for the next one. made: (1,), how many of
    drafts (1, k) there are. size: (1,), see `Looked`. answers: (2, 1, T), T > k.
    """
    most = drafts.shape[1]
    tokens, sure = answers[0, :, : most + 1], answers[1, :, : most + 1]
    numbers = torch.stack([made, size], 1).float()
    said.copy_(torch.cat([numbers, drafts.float(), sures, tokens, sure], 1)[0])
    table.copy_(settled(table, made, drafts, tokens.long()))


def settled(table: Tensor, made: Tensor, drafts: Tensor, ends: Tensor) -> Tensor:
    """A table (n, 4 + T), of `Chains`, for the next round: windows of the drafts that the end
    agrees with, and its own token.

    made: (n,), how many of drafts (n, k), k ≤ T, there are. ends: (n, k + 1), what the end says.
    """
    index = torch.arange(drafts.shape[1], device=table.device)
    same = (ends[:, :-1] == drafts) & (index < made[:, None])
    kept = same.long().cumprod(1).sum(1, keepdim=True)
    own = ends.gather(1, kept)
    spread = torch.nn.functional.pad(drafts, (0, table.shape[1] - 4 - drafts.shape[1]))
    window = torch.where(torch.arange(spread.shape[1], device=table.device) < kept, spread, own)
    first = table[:, 1:2] + table[:, 2:3]
    return torch.cat([table[:, :1], first, kept + 1, table[:, 3:4], window], 1)
