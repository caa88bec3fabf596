"""Drafts of the exits and how the final exit settles them, without changing the distribution.

A draft x, chosen with probability q(x), is kept with probability min(1, p(x)/q(x)), p being the
final exit's; in place of the first that is not kept, a token is chosen from max(0, p − q),
normalised. What comes out has the distribution p (speculative sampling: Leviathan et al., arXiv
2211.17192, section 2.3). Both p and q are what transformers' logits processors make of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ee_tuning.decode.decoder import Token
from ee_tuning.losses import confidence


@dataclass
class Draft:
    """A token that left early: its prediction, what was chosen (1, 1), and q (1, V) if sampled."""

    token: Token
    chosen: Tensor
    probabilities: Tensor | None


class Chooser:
    """Chooses tokens from logits as transformers does."""

    def __init__(self, processors: Any, sample: bool) -> None:
        self.processors, self.sample = processors, sample

    def choose(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """What follows ids (1, T) by logits (1, V): a token (1, 1); its distribution if sampled."""
        scores = self.processors(ids, logits)
        if not self.sample:
            return scores.argmax(-1, keepdim=True), None
        probabilities = scores.softmax(-1)
        return torch.multinomial(probabilities, num_samples=1), probabilities

    def verify(self, ids: Tensor, logits: Tensor, draft: Draft) -> Tensor:
        """The token (1, 1) that follows ids by the final logits (1, V): the draft's, if kept."""
        scores = self.processors(ids, logits)
        if draft.probabilities is None:
            return scores.argmax(-1, keepdim=True)
        p, q = scores.softmax(-1), draft.probabilities
        kept = torch.rand((), device=p.device) * q[0, draft.chosen[0]] < p[0, draft.chosen[0]]
        if kept:
            return draft.chosen
        rest = (p - q).clamp(min=0)
        return torch.multinomial(rest if rest.sum() > 0 else p, num_samples=1)


def settle(
    ids: Tensor, drafts: list[Draft], token: Token, chooser: Chooser
) -> list[tuple[Token, Tensor]]:
    """The tokens that a full pass settles, each with its (1, 1) id: kept drafts, then one more.

    ids: (1, T), ending with the drafts. token: the full pass's prediction, logits (N + 1, V).
    """
    settled: list[tuple[Token, Tensor]] = []
    start = ids.shape[1] - len(drafts)
    for i, draft in enumerate(drafts):
        logits = token.logits[i : i + 1]
        chosen = chooser.verify(ids[:, : start + i], logits, draft)
        if chosen.item() != draft.chosen.item():
            own = Token(logits, token.exit_layer, confidence(logits[-1]).item())
            return [*settled, (own, chosen)]
        settled.append((draft.token, draft.chosen))
    return [*settled, (token, chooser.choose(ids, token.logits[-1:])[0])]


class Pace:
    """How long drafts may be, by how many were kept: 2 more after all, 1 less after a rejection."""

    def __init__(self, longest: int) -> None:
        self.longest, self.length = longest, min(longest, 4)

    def learn(self, drafted: int, kept: int) -> None:
        """Take in that `kept` of `drafted` tokens were right."""
        if kept < drafted:
            self.length = max(min(1, self.longest), self.length - 1)
        elif drafted == self.length:
            self.length = min(self.longest, self.length + 2)

    def drafts(self, room: int) -> int:
        """Drafts of the next round, if `room` more tokens are wanted: the last needs none."""
        return max(0, min(self.length, room - 1))
