"""Texts that go through the one segment there is, each fed on the device with the token before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ee_tuning.devices import sent
from ee_tuning.passes.graphs import Sizes
from ee_tuning.passes.wanted import Wanted, handed_on, told


@dataclass
class Straight:
    """As many tokens of these texts as one likes, without a word from the host.

    run: `Passes.run`. control: what passes are told, its first n rows moved on here: nothing else
    may be told in between. reach: places that are known. slots: of the n rows. texts: of these, the
    texts', each once. kind: the last two of the pass's arguments. sizes: of compiled passes, if
    they are.
    """

    run: Callable[[tuple[Any, ...]], Any]
    control: Tensor
    reach: int
    slots: list[int]
    texts: list[int]
    kind: tuple[bool, Wanted]
    sizes: Sizes | None

    @torch.inference_mode()
    def find(self, count: int) -> Tensor:
        """The next `count` tokens, (count, 2, n): these and confidences."""
        found, rows = [], len(self.slots)
        control = self.control[:rows]
        for _ in range(count):
            self.reach += 1
            reach = self.reach if self.sizes is None else self.sizes.reach(self.reach)
            answers = self.run((0, rows, 1, reach, *self.kind))[1][:, :, 0]
            control[:, 3] = answers[0]
            control[:, 1] += 1
            found.append(answers.clone())
        return torch.stack(found)

    @cached_property
    def where(self) -> dict[int, int]:
        """By slot, a row of it."""
        return {slot: row for row, slot in enumerate(self.slots)}

    @property
    def rows(self) -> list[int]:
        """Those of the texts."""
        return [self.where[slot] for slot in self.texts]

    def hand_on(self, table: Sequence[Sequence[int]], known: Collection[int]) -> None:
        """Behind these, tell passes of other windows of one token each, see `wanted.table_of`: of
        slots that are `known` with the token found here."""
        where, number = self.where, len(table)
        every = [
            [*one, number + where[one[0]] if one[0] in known else row]
            for row, one in enumerate(table)
        ]
        new = sent(told(every), self.control.device)
        self.control[:number, :4] = handed_on(new, self.control[:, :4])
