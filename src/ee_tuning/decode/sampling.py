"""Which token follows: chosen from logits as transformers does, drafts kept or not.

A draft is kept if it is the token that the final exit gives in its place: its likeliest one, or
where a text is sampled, the one that it draws. Both draw with the same noise (see `noise`), so a
text that is sampled has the tokens that it has at full depth, whatever drafted them. A draft drawn
from q, where the final exit draws from p, is kept with a probability of at least (1 − d) / (1 + d),
where 1 − d = Σ min(p, q) is the most that is possible (Daliri, Musco, Suresh: Coupling without
communication and drafter-invariant speculative decoding, arXiv 2408.07978).

Passes choose themselves, by a `Warp`. What needs more, any other of transformers' processors, is
asked here. What a text's own processors make of the logits is what p and q are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ee_tuning.errors import UserError
from ee_tuning.passes.draws import NOTHING, read_warp
from ee_tuning.passes.noise import gumbel, places
from ee_tuning.passes.wanted import Prediction


@dataclass
class Token:
    """A token of a sequence, the layer at which it was predicted, and the confidence there.

    ends: it is the last one of its text. rejected: the drafts in whose place it came.
    """

    id: int
    exit_layer: int
    confidence: float
    ends: bool = False
    rejected: Sequence[int] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, in half the time that a dict takes: a server's engine sends many."""
        return Token, (self.id, self.exit_layer, self.confidence, self.ends, self.rejected)


class Chooser:
    """How the tokens of one sequence are chosen.

    processors: of logits, transformers'. seed: of the samples, below `noise.SEEDS`; None, until
    the engine gives one. warp: what `processors` do, as far as passes can do it. in_passes: they
    can do all of it, and what they found is the token that follows.
    """

    def __init__(self, processors: Any = (), sample: bool = False, seed: int | None = None) -> None:
        self.processors, self.sample, self.seed = processors, sample, seed
        self.warp, self.in_passes = read_warp(processors)

    @property
    def scores(self) -> bool:
        """Whether there is more to it than the likeliest token."""
        return self.sample or len(self.processors) > 0

    @property
    def samples(self) -> int:
        """What a pass does to choose a token: see `passes.draws`."""
        return self.warp.samples if self.sample and self.in_passes else NOTHING

    def choose(self, found: Prediction) -> int:
        """What follows, where a pass has found that."""
        check_evidence(found.confidence)
        return found.token

    def verify(
        self, ids: Sequence[int], said: Sequence[Prediction], drafts: Sequence[Token]
    ) -> tuple[int, int]:
        """How many of the drafts that `ids` end with are kept, and the token that follows these.

        said: the final exit's prediction of each draft, and of what follows the last one.
        """
        for kept, draft in enumerate(drafts):
            token = self.choose(said[kept])
            if token != draft.id:
                return kept, token
        return len(drafts), self.choose(said[-1])


@dataclass
class Asked:
    """What follows a text that ends with `drafts`, and whether these are kept.

    said: the prediction of each draft, and of what follows the last one.
    """

    chooser: Chooser
    ids: Sequence[int]
    said: Sequence[Prediction]
    drafts: Sequence[Token] = ()


@dataclass
class Choice:
    """The token that follows the first `kept` drafts, or why there is none."""

    token: int = -1
    kept: int = 0
    error: Exception | None = None


Pair = tuple[Asked, Choice]


def choose(asked: Sequence[Asked]) -> list[Choice]:
    """What follows texts by predictions of one pass: at most one wait for the device.

    A mistake in what one of them has brought along is its own `error`.
    """
    pairs = [(one, Choice()) for one in asked]
    for one, choice in pairs:
        if one.chooser.in_passes:
            try:
                choice.kept, choice.token = one.chooser.verify(one.ids, one.said, one.drafts)
            except Exception as error:
                choice.error = error
    if others := [pair for pair in pairs if not pair[0].chooser.in_passes]:
        _process(others)
    return [choice for _, choice in pairs]


def _process(pairs: Sequence[Pair]) -> None:
    """Fill in the choices of texts with processors that passes do not know."""
    flat = [(one, choice, place) for one, choice in pairs for place in range(len(one.said))]
    scores = _logits([one.said[place] for one, _, place in flat])
    errors = dict[int, Exception]()  # by row: behind a draft that is not kept there is none
    for row, (one, _, place) in enumerate(flat):
        text = one.ids[: len(one.ids) - len(one.drafts) + place]
        try:
            ids = torch.tensor([text], device=scores.device)
            scores[row] = one.chooser.processors(ids, scores[row][None])[0]
        except Exception as error:
            errors[row] = error
    best = _with_noise(flat, scores).max(-1)
    table = torch.stack([best.indices.float(), best.values.float()]).tolist()  # exact up to 2²⁴
    start = 0
    for one, choice in pairs:
        own = zip(*(row[start : start + len(one.said)] for row in table), strict=True)
        for choice.kept, (token, value) in enumerate(own):
            choice.error = errors.get(start + choice.kept)
            _fill(choice, token, value)
            last = choice.kept == len(one.drafts)
            if choice.error is not None or last or choice.token != one.drafts[choice.kept].id:
                break
        if choice.error is not None and choice.kept:
            # The next round meets it, if the text has not ended with the draft before.
            choice.kept -= 1
            choice.token, choice.error = one.drafts[choice.kept].id, None
        start += len(one.said)


def _logits(found: Sequence[Prediction]) -> Tensor:
    """Logits (N, V) fp32 of predictions of one pass; a copy."""
    every = found[0].all.logits
    if len(found) == 1:
        return found[0].logits[None].clone()
    places = torch.tensor([[one.row, one.place] for one in found], device=every.device)
    return every[places[:, 0], places[:, 1]]


def _with_noise(flat: Sequence[tuple[Asked, Choice, int]], scores: Tensor) -> Tensor:
    """Scores (N, V) of texts with what sampled ones are drawn by; each follows a place."""
    rows = [row for row, (one, _, _) in enumerate(flat) if one.chooser.sample]
    if not rows:
        return scores
    sampled = [flat[row] for row in rows]
    lasts = [len(one.ids) - len(one.drafts) + place - 1 for one, _, place in sampled]
    table = torch.tensor(
        [rows, [one.chooser.seed for one, _, _ in sampled], lasts], device=scores.device
    )
    noise = gumbel(places(table[1], table[2]), torch.arange(scores.shape[1], device=scores.device))
    return scores.index_add(0, table[0], noise.to(scores.dtype))


def _fill(choice: Choice, token: float, evidence: float) -> None:
    """Take a token; evidence: the score that speaks for it."""
    if choice.error is not None:
        return
    choice.token = int(token)
    try:
        check_evidence(evidence)
    except UserError as error:
        choice.error = error


def check_evidence(value: float) -> None:
    """Refuse a token for which nothing speaks.

    Raises:
        UserError: the score or confidence is no number, or minus infinity.
    """
    if math.isnan(value) or value == -math.inf:
        raise UserError(
            "there is no token to choose: the logits are not finite, or every token is excluded; "
            "see temperature and what else changes the logits"
        )
