"""Texts that go through the one segment there is, each fed on the device with the token before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ee_tuning.passes.passes import Passes
from ee_tuning.passes.wanted import Wanted, Window


class Straight:
    """As many tokens of these texts as one likes, without a word from the host.

    What the passes were told is moved on by the device: nothing else may be told in between.
    """

    def __init__(
        self, passes: Passes, windows: Sequence[Window], starts: Sequence[int], wanted: Wanted
    ) -> None:
        """windows: of one token each, by slot, of all texts in progress. starts: see `window`."""
        given = {window.slot: window for window in windows}
        slots = passes.sizes.filled(list(given)) if passes.compile else list(given)
        passes.tell(slots, starts, given, 1)
        self._passes, self._wanted, self._in_order = passes, wanted, passes.in_order(slots)
        self._reach = max(starts[slot] for slot in slots)
        self._control = passes.control[: len(slots)]
        self.rows = [row for row, slot in enumerate(slots) if slot in given]
        self.number = len(slots)

    @torch.inference_mode()
    def find(self, count: int) -> Tensor:
        """The next `count` tokens, (count, 2, n): these and confidences, texts at `rows`."""
        passes, found = self._passes, []
        for _ in range(count):
            self._reach += 1
            size = passes.sizes.reach(self._reach) if passes.compile else self._reach
            key = 0, len(self._control), 1, size, self._in_order, self._wanted
            _, answers = passes.run(key)
            self._control[:, 3] = answers[0, :, 0]
            self._control[:, 1] += 1
            found.append(answers[:, :, 0].clone())
        return torch.stack(found)
