"""Texts that go through the one segment there is, each fed on the device with the token before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Straight:
    """As many tokens of these texts as one likes, without a word from the host.

    run: a pass that looks at so many places; gives tokens and confidences, (2, n, 1). control: what
    passes are told, (n, 4), moved on here: nothing else may be told in between. reach: places that
    are known. rows: of n, those that are texts.
    """

    run: Callable[[int], Tensor]
    control: Tensor
    reach: int
    rows: list[int]

    @torch.inference_mode()
    def find(self, count: int) -> Tensor:
        """The next `count` tokens, (count, 2, n): these and confidences."""
        found = []
        for _ in range(count):
            self.reach += 1
            answers = self.run(self.reach)[:, :, 0]
            self.control[:, 3] = answers[0]
            self.control[:, 1] += 1
            found.append(answers.clone())
        return torch.stack(found)
