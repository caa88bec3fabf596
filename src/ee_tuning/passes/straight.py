"""Texts that go through the one segment there is, each fed on the device with the token before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ee_tuning.invariant import Invariant
from ee_tuning.passes.graphs import Graphs, Sizes, compiled
from ee_tuning.passes.wanted import Wanted, handed_on, told

PIECES = 4, 2, 1  # tokens of each text that are found by one graph
# As of `Passes`, which what it has does not keep, but where passes are compiled for a CPU: so its
# memory is free as soon as nobody has it.
Forward = Callable[..., Any]


class Feed:
    """What goes on with windows of one token each, as `control` tells of them, see `Passes`, and
    leaves there what the next ones are.

    sizes: of compiled passes, if they are.
    """

    def __init__(
        self, control: Tensor, sizes: Sizes, graphs: Graphs | None, invariant: Invariant
    ) -> None:
        """graphs: where passes are compiled."""
        self.sizes, self._graphs = None if graphs is None else sizes, graphs
        self._invariant = invariant
        self._control = control[:, :4]
        self._given = control.new_zeros(len(control), 5)
        self._next = compiled(_next, graphs is not None)
        self._tell = compiled(_tell, graphs is not None)

    def tell(
        self, slots: Sequence[int], starts: Sequence[int], newest: Mapping[int, int],
        known: Mapping[int, int],
    ) -> None:  # fmt: skip
        """Tell of the windows of slots, of which those that have no newest token are idle.

        starts: of every slot, the window's position. known: by slot, the row that has the token.
        """
        number = len(slots)
        columns = (  # which are made, and become a tensor, in half the time that rows take
            slots,
            [starts[slot] for slot in slots],
            [slot in newest for slot in slots],
            [newest.get(slot, 0) for slot in slots],
            [number + known[slot] if slot in known else row for row, slot in enumerate(slots)],
        )
        given = self._given[:number]
        given.copy_(told(columns).t().contiguous(), non_blocking=True)
        self._run(("told", number), partial(self._tell, self._control, given))

    def find(
        self, forward: Forward, count: int, rows: int, reach: int, in_order: bool, wanted: Wanted
    ) -> Tensor:
        """The next tokens of the first rows, (count, 2, n): these and confidences; good until the
        next are found."""
        key = count, rows, reach, in_order, wanted
        tune = rows == 1 and self._invariant.missing is not None  # as for passes
        found: Tensor = self._run(("fed", *key), partial(self._find, forward, *key), tune)
        return found

    def _find(self, forward: Forward, count: int, rows: int, *rest: Any) -> Tensor:
        control, found = self._control[:rows], []
        for _ in range(count):
            _, answers = forward(0, rows, 1, *rest)
            found.append(self._next(control, answers))
        return torch.stack(found)

    def _run(self, key: tuple[Any, ...], function: Callable[[], Any], tune: bool = False) -> Any:
        if self._graphs is None:
            return function()
        return self._graphs.run(key, function, tune, moved=[self._control])

    def to_warm(
        self,
        forward: Forward,
        pieces: Sequence[int],
        asked: Sequence[tuple[int, int, bool, Wanted]],
    ) -> list[Callable[[], Any]]:
        """What captures pieces of passes, and what tells of windows; see `ee_tuning.passes.warm`.
        asked: of each pass what `find` is given behind `count`."""
        rows = sorted({one[0] for one in asked})
        slots, nothing = [range(number) for number in rows], [0] * max(rows, default=0)
        return [
            *(partial(self.tell, some, nothing, {}, {}) for some in slots),
            *(partial(self._warm, forward, count, *one) for one in asked for count in pieces),
        ]

    def _warm(self, *key: Any) -> None:
        self._control[:, 1:].zero_()  # who goes on and on leaves the slots
        self.find(*key)


@dataclass
class Straight:
    """As many tokens of these texts as one likes, without a word from the host.

    feed: finds them, by `forward` of `Passes`: nothing else may be told of in between. reach:
    places that are known. slots: of its rows. texts: of these, the texts', each once. kind: whether
    the slots are in order, and what is wanted.
    """

    feed: Feed
    forward: Forward
    reach: int
    slots: list[int]
    texts: list[int]
    kind: tuple[bool, Wanted]

    @torch.inference_mode()
    def find(self, count: int) -> Tensor:
        """The next `count` tokens, (count, 2, n): these and confidences; good until the next."""
        found, rows, sizes = list[Tensor](), len(self.slots), self.feed.sizes
        while count:
            number = 1 if sizes is None else next(one for one in PIECES if one <= count)
            count -= number
            self.reach += number
            reach = self.reach if sizes is None else sizes.reach(self.reach)
            piece = self.feed.find(self.forward, number, rows, reach, *self.kind)
            found.append(piece.clone() if count else piece)
        return torch.cat(found) if len(found) > 1 else found[0]

    @cached_property
    def where(self) -> dict[int, int]:
        """By slot, a row of it."""
        return {slot: row for row, slot in enumerate(self.slots)}

    @property
    def rows(self) -> list[int]:
        """Those of the texts."""
        return [self.where[slot] for slot in self.texts]


def _tell(control: Tensor, given: Tensor) -> None:
    """Tell passes, (slots, 4), of the windows that are given, (n, 5): see `handed_on`."""
    control[: len(given)] = handed_on(given, control)


def _next(control: Tensor, answers: Tensor) -> Tensor:
    """What follows windows of one token each, (2, n, 1), as (2, n); it is the next one's token.

    control: (n, 4).
    """
    found = answers[:, :, 0]
    new = torch.stack([control[:, 0], control[:, 1] + 1, control[:, 2], found[0].long()], 1)
    control.copy_(new)
    return found.clone()
