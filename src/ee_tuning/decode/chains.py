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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ee_tuning.backbone import State
from ee_tuning.decode.cache import Place, SlotCache
from ee_tuning.decode.draws import ALL, NOTHING, drawn, places_of
from ee_tuning.decode.graphs import Graphs, Sizes, compiled
from ee_tuning.exits import DraftExit
from ee_tuning.losses import confidence, likeliest


@dataclass
class Link:
    """The window of one sequence: the tokens that were settled since its last chain.

    first: the position of the first of `ids`. limit: drafts at most.
    """

    slot: int
    first: int
    ids: Sequence[int]
    limit: int = 0


class Query(NamedTuple):
    """How a draft is chosen: the measure of confidence, how it is drawn (see `draws`), and for n
    rows, theirs of `Draws`, (n, 5), and the places (n, 1) in noise of what drafts follow."""

    measure: str | None
    samples: int
    draws: Tensor
    place: Tensor


class Chains:
    """The draft exit's passes, for up to `slots` sequences at a time.

    bars: (slots,) fp32; a chain ends with the draft at which the product of its confidences falls
    below its slot's.
    """

    def __init__(
        self,
        exit: DraftExit,
        cache: SlotCache,
        sizes: Sizes,
        graphs: Graphs | None,
        control: Tensor,
        draws: Tensor,
        limit: int,
    ) -> None:
        """cache: for the exit's block. graphs: where passes are compiled. control: what a pass of
        the first segment is told, (slots, 3 + tokens), see `Passes`. draws: the table of `Draws`.
        limit: the last position."""
        self.exit, self.cache, self.sizes, self.graphs = exit, cache, sizes, graphs
        self._control, self._draws, self._limit = control, draws, limit
        weight = exit.first.weight
        width, device = weight.shape[0], weight.device
        slots, size = len(control), 2 * sizes.longest
        self._states = torch.zeros(
            (slots, size, width * len(exit.sources)), dtype=weight.dtype, device=device
        )
        self.bars = torch.zeros(slots, device=device)
        self._table = torch.zeros((slots, 4 + sizes.longest), dtype=torch.int64, device=device)
        self._first = compiled(_first_draft, graphs is not None)
        self._later = compiled(_later_draft, graphs is not None)

    def keep(self, slots: Tensor, positions: Tensor, state: State) -> None:
        """Take in what a segment's pass gives for the tokens of slots (n,) at positions (n, T)."""
        if state.sources:
            places = positions % self._states.shape[1]
            self._states[slots[:, None], places, self._part(state)] = torch.cat(state.sources, -1)

    def forget(self, slot: int) -> None:
        """As of passes."""
        self.cache.forget(slot)
        self._states[slot] = 0

    def _part(self, state: State) -> slice:
        """Where the sources of a segment are among all of them."""
        width = state.hidden.shape[-1]
        end = sum(layer <= state.stop for layer in self.exit.sources)
        return slice((end - len(state.sources)) * width, end * width)

    def prompt(
        self, slots: Tensor, ids: Tensor, positions: Tensor, states: Sequence[State]
    ) -> None:
        """K/V of a whole prompt (1, P) that was read in one pass of some segments."""
        sources = torch.cat([one for state in states for one in state.sources], -1)
        self._states[slots, positions[0, -1:] % self._states.shape[1]] = sources[:, -1]
        earlier = torch.nn.functional.pad(sources[:, :-1], (0, 0, 1, 0))
        self.cache.put(Place(slots, positions, ids.shape[1], in_order=False, empty=True))
        self.exit.first_step(ids, earlier, positions, self.cache)

    def fill(self, links: Sequence[Link], starts: Sequence[int]) -> None:
        """K/V of settled tokens alone."""
        self._advance(links, starts, 0, "", NOTHING)

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
        given = {link.slot: link for link in links}
        slots, length = sorted(given), max(len(link.ids) for link in links)
        if self.graphs is not None:
            slots, length = self.sizes.filled(slots), self.sizes.link(length)
        table, end = [], 0
        for slot in slots:
            link = given.get(slot) or Link(slot, starts[slot], (0,))
            number = len(link.ids)
            end = max(end, link.first + max(length, number + count))
            padding = [0] * (length - number)
            table.append([slot, link.first, number, link.limit, *link.ids, *padding])
        self._table[: len(slots), : 4 + length].copy_(torch.tensor(table), non_blocking=True)
        in_order = self._in_order(slots)
        if self.graphs is None:
            reach = max(row[1] for row in table) + length
            size = len(slots), length, count, reach
            return slots, self._forward(*size, in_order, measure, samples)
        size = len(slots), length, count, self.sizes.reach(end)
        key = (*size, in_order, measure, samples)
        return slots, self._run(key)

    def warm_up(self, counts: Iterable[int], measures: Sequence[str], samples: int) -> None:
        """Compile and capture every size; see `Passes.warm_up`."""
        self._table.zero_()
        self._table[:, 0] = torch.arange(len(self._table), device=self._table.device)
        self._table[:, 2] = 1
        for (rows, length, reach), measure in product(self.sizes.chains(), measures):
            in_order = self._in_order(list(range(rows)))
            for count in counts if length == self.sizes.windows[-1] else ():
                self._run((rows, length, count, reach, in_order, measure, min(samples, ALL)))
            self._run((rows, length, 0, reach, in_order, "", NOTHING))

    def _run(self, key: tuple[Any, ...]) -> Any:
        assert self.graphs is not None
        tune = key[:2] == (1, 1)  # as for passes
        return self.graphs.run(("chain", *key), lambda: self._forward(*key), tune=tune)

    def _forward(
        self,
        rows: int,
        length: int,
        count: int,
        reach: int,
        in_order: bool,
        measure: str,
        samples: int,
    ) -> Tensor | None:
        table = self._table[:rows, : 4 + length]
        slots, firsts, counts, limits = table[:, :4].unbind(1)
        ids, lasts = table[:, 4:], firsts + counts - 1
        positions = firsts[:, None] + torch.arange(length, device=table.device)
        earlier = positions - 1
        states = self._states[slots[:, None], earlier % self._states.shape[1]]
        states = states.masked_fill((earlier < 0)[..., None], 0)
        place = Place(slots, positions, reach, in_order)
        self._put(place, reach - length)
        draws = self._draws[slots]
        spots = places_of(draws, lasts[:, None]) if samples else lasts[:, None]
        query = Query(measure if count else None, samples, draws, spots)
        found = self._first(
            self.exit, self.cache, (ids, states, positions.clamp(max=self._limit)),
            self._masks(), counts, query,
        )  # fmt: skip
        if found is None:
            return None
        drafts, sure = [found[0]], [found[1]]
        certain, bars, hidden = found[1], self.bars[slots], found[2]
        for number in range(1, count):
            if self.graphs is None:
                if not bool(((certain >= bars) & (limits > number)).any()):
                    break
                reach += 1
            at = (lasts + number)[:, None]
            self._put(Place(slots, at, reach, in_order), reach - 1)
            token, confidence, hidden = self._later(
                self.exit, self.cache, (drafts[-1][:, None], hidden, at.clamp(max=self._limit)),
                self._masks(), query._replace(place=places_of(draws, at) if samples else at),
            )  # fmt: skip
            certain = certain * confidence
            drafts.append(token)
            sure.append(confidence)
        return self._say(slots, lasts, ids, limits, drafts, sure)

    def _say(
        self, slots: Tensor, lasts: Tensor, ids: Tensor, limits: Tensor,
        drafts: list[Tensor], sure: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """What `draft` gives; and tell the pass that verifies."""
        tokens, sures, rows = torch.stack(drafts, 1), torch.stack(sure, 1), len(slots)
        goes_on = sures.cumprod(1)[:, :-1] >= self.bars[slots][:, None]
        numbers = (1 + goes_on.sum(1)).minimum(limits)
        counts = lasts - self._table[:rows, 1]
        newest = ids.gather(1, counts[:, None])
        told = [slots[:, None], lasts[:, None], torch.full_like(newest, 1 + len(drafts))]
        control = torch.cat([*told, newest, tokens], dim=1)
        self._control[:rows, : control.shape[1]] = control
        return torch.cat([numbers[:, None].float(), tokens.float(), sures], dim=1)

    def _in_order(self, slots: list[int]) -> bool:
        """As of passes."""
        whole = self.graphs is None or len(slots) == len(self._table)
        return whole and slots == list(range(len(slots)))

    def _put(self, place: Place, start: int) -> None:
        """The next step is at `place`; start: its first position, if there is one row, eager."""
        if self.graphs is None and len(place.slots) == 1 and place.in_order:
            place.start = start
        self.cache.put(place)

    def _masks(self) -> Any:
        (layer,) = self.cache.slot_layers
        if not layer.hides and self.exit.sees_first:
            return None
        mask = layer.mask(self._states.dtype)
        if not self.exit.sees_first:  # of the texts' later tokens; there is no window then
            later = (layer.place.positions > 0)[:, None, :, None]
            mask[..., :1].masked_fill_(later, torch.finfo(mask.dtype).min)
        return self.exit.segment.masks(lambda _: mask)


def _first_draft(
    exit: DraftExit,
    cache: SlotCache,
    inputs: tuple[Tensor, Tensor, Tensor],
    masks: Any,
    counts: Tensor,
    query: Query,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `_ask`, of the last token of windows of `counts` (n,) tokens; no measure: K/V alone.

    inputs: ids, states of the tokens before them, positions.
    """
    ids, states, positions = inputs
    hidden = exit.first_step(ids, states, positions, cache, masks)
    if query.measure is None:
        return None
    rows = torch.arange(len(counts), device=counts.device)
    return _ask(exit, hidden[rows, (counts - 1).clamp(min=0)][:, None], query)


def _later_draft(
    exit: DraftExit,
    cache: SlotCache,
    inputs: tuple[Tensor, Tensor, Tensor],
    masks: Any,
    query: Query,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `_ask`. inputs: drafts (n, 1), the exit's output at the tokens before, positions."""
    return _ask(exit, exit.later_step(*inputs, cache, masks), query)


def _ask(exit: DraftExit, hidden: Tensor, query: Query) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens (n,) that are drafted, how sure of the likeliest, and hidden (n, 1, H)."""
    assert exit.norm is not None
    assert query.measure is not None
    logits, tokens = exit.output.known_logits(exit.norm(hidden)).float(), exit.output.tokens
    found = likeliest(logits)
    if query.samples:
        found = drawn(logits, found, query.draws, query.place, query.samples, tokens)
    token, sure = found[:, 0], confidence(logits[:, 0], query.measure)
    return token if tokens is None else tokens[token], sure, hidden
