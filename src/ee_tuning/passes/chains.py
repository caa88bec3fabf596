"""Chains of drafts: what the draft exit makes of the states that passes to the end leave behind.

A pass to the end keeps the hidden states after the exit's source layers in a ring by position. A
chain begins with a *window*, the tokens that were settled since the last one, each with the states
of the token before it: what the exit makes of the newest is the first draft, and the others give
the exit's K/V of settled tokens. Further drafts follow one by one, each from the exit's own output;
their K/V are written over by the next window.

A chain is one captured graph where there are graphs, the stop by confidence included, and leaves
its drafts where the pass that verifies them looks for its tokens: the host waits for both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ee_tuning.exits import DraftExit
from ee_tuning.invariant import Invariant
from ee_tuning.losses import confidence, likeliest
from ee_tuning.passes.cache import Place, SlotCache
from ee_tuning.passes.draws import ALL, NOTHING, drawn, places_of
from ee_tuning.passes.graphs import Graphs, Sizes, compiled
from ee_tuning.passes.sources import Sources
from ee_tuning.passes.wanted import told
from ee_tuning.slices import group_of


@dataclass
class Link:
    """The window of one sequence: the tokens that were settled since its last chain.

    first: the position of the first of `ids`. limit: drafts at most.
    """

    slot: int
    first: int
    ids: Sequence[int]
    limit: int = 0


def filled(
    links: Sequence[Link], starts: Sequence[int], sizes: Sizes | None, length: int = 1
) -> list[Link]:
    """`links` by slot, and those of idle slots that make them as many as passes are compiled for.

    starts: as of `Chains.draft`. sizes: None, where nothing is compiled. length: of the windows.
    """
    given = {link.slot: link for link in links}
    slots = sorted(given) if sizes is None else sizes.filled(sorted(given), length)
    return [given.get(slot) or Link(slot, starts[slot], (0,)) for slot in slots]


class Tables(NamedTuple):
    """What chains of n rows are made from: of `Chains`.

    table: (n, 4 + T) int64: slot, first position of a window, its tokens' number, drafts at most,
    and these tokens. states: (slots, ring, W), of the sources, by position. bars: (slots,). draws:
    (slots, 5), the table of `Draws`.
    """

    table: Tensor
    states: Tensor
    bars: Tensor
    draws: Tensor


class Step(NamedTuple):
    """How drafts are made, the same for all rows.

    reach, in_order, start: see `Place`. limit: the last position. measure: of confidence; None:
    there are no drafts. samples: how they are drawn, see `draws`.
    """

    reach: int
    in_order: bool
    limit: int
    measure: str | None
    samples: int
    start: int | None = None


# Tokens (n,), the confidence in the likeliest ones, and hidden states (n, 1, H).
Found = tuple[Tensor, Tensor, Tensor]


class Chains:
    """The draft exit's passes, for up to `slots` sequences at a time.

    bars: (slots,) fp32; a chain ends with the draft at which the product of its confidences falls
    below its slot's.
    """

    def __init__(
        self,
        exit: DraftExit,
        invariant: Invariant,
        cache: SlotCache,
        sizes: Sizes,
        graphs: Graphs | None,
        control: Tensor,
        draws: Tensor,
        sources: Sources,
        limit: int,
    ) -> None:
        """invariant: of the backbone's products. cache: for the exit's block. graphs: where
        passes are compiled. control: what a pass of the first segment is told, (slots, 3 + tokens),
        see `Passes`. draws: the table of `Draws`. sources: what a first draft reads. limit: the
        last position."""
        self.exit, self.cache = exit, cache
        # Runs in its place, but on prompts.
        self.twin = invariant.exit(exit, cache, min(limit + 1, sizes.places))
        self.sizes, self.graphs = sizes, graphs
        self.control, self.draws, self.limit = control, draws, limit
        slots, device = len(control), control.device
        self.states = sources.states
        self.bars = torch.zeros(slots, device=device)
        self.table = torch.zeros((slots, 4 + sizes.longest), dtype=torch.int64, device=device)
        # How many drafts come before one, for the device.
        self.numbers = torch.arange(sizes.longest + 1, device=device)
        self._nothing = torch.zeros((slots, sizes.longest), device=device)
        self._group = group_of(exit)
        self._first = compiled(first_draft, graphs is not None)
        self._later = compiled(later_draft, graphs is not None)
        self.tell = compiled(_tell, graphs is not None, each=False)
        self._read = compiled(_read, graphs is not None)

    @torch.inference_mode()
    def set_bar(self, slot: int, bar: float) -> None:
        """Of the next text in a slot."""
        self.bars[slot].fill_(bar)  # a number that is written otherwise is a wait for the device

    def forget(self, slot: int) -> None:
        """As of passes."""
        self.cache.forget(slot)

    def prompt(self, slots: Tensor, ids: Tensor, positions: Tensor, sources: Tensor) -> None:
        """K/V of a whole prompt (1, P) that was read in one pass, which gave (1, P, n·H)."""
        self.states[slots, positions[0, -1:] % self.states.shape[1]] = sources[:, -1]
        earlier = torch.nn.functional.pad(sources[:, :-1], (0, 0, 1, 0))
        self.cache.put(Place(slots, positions, ids.shape[1], in_order=False, empty=True))
        self.exit.first_step(ids, earlier, positions, self.cache)

    def read(self, control: Tensor, reach: int, in_order: bool) -> None:
        """K/V of the tokens of the pass to the end that has just been, part of it.

        control: what the pass was told, (n, 3 + T).
        """
        step = Step(reach, in_order, self.limit, None, NOTHING)
        self._read(self.twin, self.cache, control, self.states, step)

    def fill(self, links: Sequence[Link], starts: Sequence[int]) -> None:
        """K/V of settled tokens alone, of windows that may be as long as those of prompts."""
        most = len(links) if self.graphs is None else self.sizes.together
        for first in range(0, len(links), most):
            self._advance(links[first : first + most], starts, 0, "", NOTHING)

    def draft(
        self, links: Sequence[Link], starts: Sequence[int], count: int, measure: str, samples: int
    ) -> tuple[list[int], Tensor]:
        """Chains of up to `count` drafts; gives the slots of the rows, and what the device says.

        That is (n, 1 + 2k) fp32 of k ≤ count drafts: how many a row has, the tokens, the
        confidences. The pass that verifies is told the last token of each window and the drafts.
        starts: for every slot, how many tokens the first segment has computed. samples: how drafts
        are drawn, see `draws`.
        """
        slots, said = self._advance(links, starts, count, measure, samples)
        assert said is not None
        return slots, said

    @torch.inference_mode()
    def _advance(
        self, links: Sequence[Link], starts: Sequence[int], count: int, measure: str, samples: int
    ) -> tuple[list[int], Tensor | None]:
        sizes, length = None, max(len(link.ids) for link in links)
        if self.graphs is not None:
            sizes, length = self.sizes, self._length(count)
        every = filled(links, starts, sizes, length)
        slots, table, end = [link.slot for link in every], [], 0
        for link in every:
            number = len(link.ids)
            end = max(end, link.first + max(length, number + count))
            padding = [0] * (length - number)
            table.append([link.slot, link.first, number, link.limit, *link.ids, *padding])
        self.table[: len(slots), : 4 + length].copy_(told(table), non_blocking=True)
        reach = max(row[1] for row in table) + length if sizes is None else sizes.reach(end)
        key = len(slots), length, count, reach, self.sizes.in_order(slots), measure, samples
        return slots, self.forward(*key) if self.graphs is None else self._run(key)

    @property
    def window(self) -> int:
        """Tokens of the windows of `next_table`."""
        return self._length(1)

    def next_table(self) -> Tensor:
        """Where the windows of the next chains may be told, as in `Tables`, one for each slot."""
        return self.tables(len(self.table), self.window).table

    def to_warm(
        self, most: int, measures: Sequence[str], samples: Sequence[int], alone: bool
    ) -> list[Callable[[], Any]]:
        """What compiles every size; see `ee_tuning.passes.warm`.

        most: drafts. alone: there are drafts of one text that is alone, for which there is no
        `Rounds`.
        """
        self.table.zero_()
        self.table[:, 0] = torch.arange(len(self.table), device=self.table.device)
        self.table[:, 2] = 1
        keys: dict[tuple[Any, ...], None] = {}
        length = self._length(most)
        for (rows, reach), measure in product(self.sizes.chains(length), measures):
            in_order, alike = self.sizes.in_order(list(range(rows))), alone or rows > 1
            for kind, count in product(samples, range(1, most + 1)) if alike else ():
                keys[rows, length, count, reach, in_order, measure, min(kind, ALL)] = None
        length = self._length(0)
        for rows, reach in self.sizes.chains(length):
            in_order = self.sizes.in_order(list(range(rows)))
            keys[rows, length, 0, reach, in_order, "", NOTHING] = None
        return [partial(self._run, key) for key in keys]

    def _length(self, count: int) -> int:
        """Tokens of the windows of compiled chains of so many drafts."""
        return self.sizes.windows[-1] if count else self.sizes.longest

    def _run(self, key: tuple[Any, ...]) -> Any:
        assert self.graphs is not None
        tune = key[:2] == (1, 1)  # as for passes
        return self.graphs.run(("chain", *key), lambda: self.forward(*key), tune=tune)

    def forward(
        self, rows: int, length: int, count: int, reach: int, in_order: bool, measure: str,
        samples: int, room: int = 0,
    ) -> Any:  # fmt: skip
        """Chains of the windows of so many tokens that the table has; gives what `draft` does of
        them. reach, in_order, measure, samples: as of `Step`. room: drafts for which there are
        columns in that, if more."""
        tables, alone = self.tables(rows, length), self.graphs is None and rows == 1 and in_order
        step = Step(reach, in_order, self.limit, measure if count else None, samples)
        first = step._replace(start=reach - length if alone else None)
        found = self._first(self.twin, self.cache, tables, first)
        if found is None:
            return None
        found = self._agreed(found)
        drafts, sures, certain = [found[0]], [found[1]], found[1]
        for number in range(1, count):
            if self.graphs is None:
                slots, limits = tables.table[:, 0], tables.table[:, 3]
                if not bool(((certain >= self.bars[slots]) & (limits > number)).any()):
                    break
                reach += 1
                step = step._replace(reach=reach, start=reach - 1 if alone else None)
            before = self.numbers[number], found[0], found[2]
            found = self._agreed(self._later(self.twin, self.cache, tables, before, step))
            certain = certain * found[1]
            drafts.append(found[0])
            sures.append(found[1])
        tokens, sure = torch.stack(drafts, 1), torch.stack(sures, 1)
        numbers = self.tell(tables, self.control, tokens, sure)
        rest = self._nothing[:rows, len(drafts) : max(len(drafts), room)]
        return torch.cat([numbers[:, None].float(), tokens.float(), rest, sure, rest], dim=1)

    def _agreed(self, found: Found) -> Found:
        """With --tp, the first process's drafts on all, and how sure: see `Passes`."""
        if self._group is None:
            return found
        tokens, sure = self._group.first(torch.stack([found[0].double(), found[1].double()]))
        return tokens.long(), sure.float(), found[2]

    def tables(self, rows: int, length: int) -> Tables:
        """What the chains of so many rows, with windows of so many tokens, are made from."""
        return Tables(self.table[:rows, : 4 + length], self.states, self.bars, self.draws)


def first_draft(exit: Any, cache: SlotCache, tables: Tables, step: Step) -> Found | None:
    """The first drafts, from windows; their K/V alone, if there is no measure.

    exit: a draft exit, or its twin. cache: for its block.
    """
    slots, firsts, counts, _ = tables.table[:, :4].unbind(1)
    hidden = _windows(exit, cache, (slots, firsts, tables.table[:, 4:]), tables.states, step)
    if step.measure is None:
        return None
    rows = torch.arange(len(counts), device=counts.device)
    last = (counts - 1).clamp(min=0)
    return _ask(exit, hidden[rows, last][:, None], tables, (firsts + last)[:, None], step)


def _windows(
    exit: Any, cache: SlotCache, windows: tuple[Tensor, Tensor, Tensor], states: Tensor, step: Step
) -> Tensor:
    """The exit's output (n, T, H) at windows: slots (n,), first positions (n,), tokens (n, T)."""
    slots, firsts, ids = windows
    positions = firsts[:, None] + torch.arange(ids.shape[1], device=ids.device)
    earlier = positions - 1
    before = states[slots[:, None], earlier % states.shape[1]]
    before = before.masked_fill((earlier < 0)[..., None], 0)
    cache.put(Place(slots, positions, step.reach, step.in_order, start=step.start))
    masks = _masks(exit, cache, states.dtype)
    hidden: Tensor = exit.first_step(ids, before, positions.clamp(max=step.limit), cache, masks)
    return hidden


def _read(exit: Any, cache: SlotCache, control: Tensor, states: Tensor, step: Step) -> None:
    """K/V alone of windows that `control` of `Passes` tells of: what else there is of the exit,
    the compiler leaves out."""
    _windows(exit, cache, (control[:, 0], control[:, 1], control[:, 3:]), states, step)


def later_draft(exit: Any, cache: SlotCache, tables: Tables, before: Found, step: Step) -> Found:
    """Drafts behind others. before: how many these are, the last ones (n,), and hidden theirs."""
    number, tokens, hidden = before
    slots, firsts, counts, _ = tables.table[:, :4].unbind(1)
    at = (firsts + counts - 1 + number)[:, None]
    cache.put(Place(slots, at, step.reach, step.in_order, start=step.start))
    masks = _masks(exit, cache, tables.states.dtype)
    ids, limit = tokens[:, None], step.limit
    hidden = exit.later_step(ids, hidden, at.clamp(max=limit), cache, masks)
    return _ask(exit, hidden, tables, at, step)


def tell(table: Tensor, control: Tensor, tokens: Tensor) -> None:
    """Tell the pass that verifies, by `control` of `Passes`, of drafts (n, k) behind the windows of
    a table of `Chains`."""
    slots, firsts, counts, _ = table[:, :4].unbind(1)
    newest = table[:, 4:].gather(1, (counts - 1).clamp(min=0)[:, None])
    lasts, number = (firsts + counts - 1)[:, None], torch.full_like(newest, 1 + tokens.shape[1])
    told = torch.cat([slots[:, None], lasts, number, newest, tokens], dim=1)
    control[: len(told), : told.shape[1]] = told


def _tell(tables: Tables, control: Tensor, tokens: Tensor, sures: Tensor) -> Tensor:
    """Likewise, of chains with confidences; gives how many drafts these have: (n,).

    A chain ends with its draft at which `sures` multiplied fall below the bar.
    """
    tell(tables.table, control, tokens)
    goes_on = sures.cumprod(1)[:, :-1] >= tables.bars[tables.table[:, 0]][:, None]
    return (1 + goes_on.sum(1)).minimum(tables.table[:, 3])


def _ask(exit: Any, hidden: Tensor, tables: Tables, at: Tensor, step: Step) -> Found:
    """What follows tokens at positions `at` (n, 1), from the exit's output at these."""
    assert step.measure is not None
    logits, tokens = exit.output.known_logits(exit.norm(hidden)).float(), exit.output.tokens
    found = likeliest(logits)
    if step.samples:
        draws = tables.draws[tables.table[:, 0]]
        found = drawn(logits, found, draws, places_of(draws, at), step.samples, tokens)
    token, sure = found[:, 0], confidence(logits[:, 0], step.measure)
    return token if tokens is None else tokens[token], sure, hidden


def _masks(exit: Any, cache: SlotCache, dtype: torch.dtype) -> Any:
    """What the block is told that the tokens of the next step see."""
    (layer,) = cache.slot_layers
    if not layer.hides and exit.sees_first:
        return None
    mask = layer.mask(dtype)
    if not exit.sees_first:  # of the texts' later tokens; there is no window then
        later = (layer.place.positions > 0)[:, None, :, None]
        mask[..., :1].masked_fill_(later, torch.finfo(mask.dtype).min)
    return exit.segment.masks(lambda _: mask)
