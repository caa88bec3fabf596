"""Which token follows: chosen from logits as transformers does, drafts kept or not.

A draft x, chosen with probability q(x), is kept with probability min(1, p(x)/q(x)), p being the
final exit's; in place of the first that is not kept, a token is chosen from max(0, p − q),
normalised. What comes out has the distribution p (speculative sampling: Leviathan et al., arXiv
2211.17192, section 2.3). Both p and q are what transformers' logits processors make of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ee_tuning.decode.noise import Source, exponential, uniform
from ee_tuning.decode.passes import Prediction, logits_of
from ee_tuning.errors import UserError

# Processors that look at a row's logits alone: those with the same settings run as one.
ALIKE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


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
    probabilities: Tensor | None = None  # (V,), of a sampled token, until it is settled


class Chooser:
    """How the tokens of one sequence are chosen.

    processors: of logits, transformers'. source: of the samples. same: equal for choosers with the
    same processors, if these do not look at the text; else None.
    """

    def __init__(self, processors: Any = (), sample: bool = False) -> None:
        self.processors, self.sample, self.source = processors, sample, Source()
        plain = all(type(one) in ALIKE for one in processors)
        self.same = repr([(type(one), vars(one)) for one in processors]) if plain else None

    @property
    def scores(self) -> bool:
        """Whether there is more to it than the likeliest token."""
        return self.sample or len(self.processors) > 0

    def choose(self, ids: Sequence[int], found: Prediction) -> int:
        """What follows `ids`, where the likeliest token does."""
        check_evidence(found.confidence)
        return found.token

    def verify(
        self, ids: Sequence[int], said: Sequence[Prediction], drafts: Sequence[Token]
    ) -> tuple[int, int]:
        """How many of the drafts that `ids` end with are kept, and the token that follows these.

        said: the final exit's prediction of each draft, and of what follows the last one.
        """
        first = len(ids) - len(drafts)
        for kept, draft in enumerate(drafts):
            token = self.choose(ids[: first + kept], said[kept])
            if token != draft.id:
                return kept, token
        return len(drafts), self.choose(ids, said[-1])

    def catch_up(self, drawn: int, like: Tensor) -> None:
        """Leave out the samples before the `drawn`-th, of (V,) like these: others drew them."""
        while self.sample and self.source.drawn < drawn:
            exponential([self.source], like[None])


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
    """The token that follows the first `kept` drafts, and the distribution (V,) that it was drawn
    from, if there are no drafts; or why there is none."""

    token: int = -1
    kept: int = 0
    probabilities: Tensor | None = None
    error: Exception | None = None


Pair = tuple[Asked, Choice]


def choose(asked: Sequence[Asked]) -> list[Choice]:
    """What follows texts by predictions of one pass: all samples in one wait for the device.

    A mistake in what one of them has brought along is its own `error`.
    """
    pairs = [(one, Choice()) for one in asked]
    for one, choice in pairs:
        if not one.chooser.scores:
            try:
                choice.kept, choice.token = one.chooser.verify(one.ids, one.said, one.drafts)
            except Exception as error:
                choice.error = error
    for sample, choose_from in ((True, _sampled), (False, _likeliest)):
        alike = [p for p in pairs if p[0].chooser.scores and p[0].chooser.sample is sample]
        if alike:
            choose_from(alike, _scores(alike))
    return [choice for _, choice in pairs]


def _scores(pairs: Sequence[Pair]) -> Tensor:
    """What the processors make of all that is said to each text, one after another: (N, V)."""
    flat = [(one, choice, place) for one, choice in pairs for place in range(len(one.said))]
    scores = logits_of([one.said[place] for one, _, place in flat])
    groups: dict[str, list[int]] = {}
    for row, (one, choice, place) in enumerate(flat):
        if one.chooser.same is not None:
            groups.setdefault(one.chooser.same, []).append(row)
            continue
        text = one.ids[: len(one.ids) - len(one.drafts) + place]
        try:
            ids = torch.tensor([text], device=scores.device)
            scores[row] = one.chooser.processors(ids, scores[row][None])[0]
        except Exception as error:
            choice.error = error
    none = torch.empty((0, 0), dtype=torch.int64, device=scores.device)  # texts are not looked at
    for rows in groups.values():
        processors = flat[rows[0]][0].chooser.processors
        if not len(processors):
            continue
        if len(rows) == len(flat):
            return processors(none, scores)
        places = torch.tensor(rows, device=scores.device)
        scores[places] = processors(none, scores[places])
    return scores


def _likeliest(pairs: Sequence[Pair], scores: Tensor) -> None:
    """Fill in the choices of texts that are not sampled; scores: see `_scores`."""
    best = scores.max(-1)
    table = torch.stack([best.indices.float(), best.values.float()]).tolist()  # exact up to 2²⁴
    start = 0
    for one, choice in pairs:
        own = zip(*(row[start : start + len(one.said)] for row in table), strict=True)
        start += len(one.said)
        for choice.kept, (token, value) in enumerate(own):
            _fill(choice, token, value)
            last = choice.kept == len(one.drafts)
            if choice.error is not None or last or choice.token != one.drafts[choice.kept].id:
                break


def _sampled(pairs: Sequence[Pair], scores: Tensor) -> None:
    """Fill in the choices of texts that are sampled; scores: see `_scores`.

    A token is drawn as `torch.multinomial` draws it, which waits for the device twice to look at
    the weights.
    """
    p = scores.softmax(-1)
    weights, kept = p, torch.zeros(len(pairs), device=p.device)
    if any(one.drafts for one, _ in pairs):
        weights, kept = _verified(pairs, p)
    sources = [one.chooser.source for one, _ in pairs]
    tokens = (weights / exponential(sources, weights)).argmax(-1)
    table = torch.stack([kept.float(), tokens.float(), weights.sum(-1)]).tolist()
    for i, ((one, choice), own) in enumerate(zip(pairs, zip(*table, strict=True), strict=True)):
        choice.kept = int(own[0])
        choice.probabilities = None if one.drafts else weights[i]
        _fill(choice, *own[1:])


def _verified(pairs: Sequence[Pair], p: Tensor) -> tuple[Tensor, Tensor]:
    """Of R texts, the weights (R, V) to draw their next tokens from, and how many drafts are kept.

    p: (N, V), the distributions of all that is said to each, one after another.
    """
    counts = [len(one.drafts) for one, _ in pairs]
    firsts = list(accumulate(counts, initial=0))[:-1]  # of each text's drafts
    drafts = [(row, place, draft) for row, (one, _) in enumerate(pairs)
              for place, draft in enumerate(one.drafts)]  # fmt: skip
    columns = [[row, place, firsts[row] + row + place, draft.id] for row, place, draft in drafts]
    rows, places, said, ids = torch.tensor(columns, device=p.device).unbind(1)
    q = torch.stack([_distribution(draft, p) for *_, draft in drafts])
    lots = uniform([one.chooser.source for one, _ in pairs], counts, p.device)
    right = torch.zeros_like(lots, dtype=torch.int64)
    drawn = torch.arange(len(drafts), device=p.device)
    right[rows, places] = (lots[rows, places] * q[drawn, ids] < p[said, ids]).long()
    kept = right.cumprod(1).sum(1)
    numbers, first = torch.tensor([counts, firsts], device=p.device)
    own = p[first + torch.arange(len(pairs), device=p.device) + kept]
    rest = (own - q[(first + kept).clamp(max=len(drafts) - 1)]).clamp(min=0)
    rejected = (kept < numbers) & (rest.sum(-1) > 0)
    return torch.where(rejected[:, None], rest, own), kept


def _distribution(draft: Token, like: Tensor) -> Tensor:
    """The one (V,) that a draft was drawn from; like: of as many tokens.

    A draft that was not drawn would always be the same: the one that it is has all the weight.
    """
    if draft.probabilities is not None:
        return draft.probabilities
    return like.new_zeros(like.shape[-1]).index_fill(
        0, torch.tensor(draft.id, device=like.device), 1.0
    )


def _fill(choice: Choice, token: float, evidence: float) -> None:
    """Take a token; evidence: the score or weight that speaks for it."""
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
        UserError: the score, weight or confidence is no number, or minus infinity.
    """
    if math.isnan(value) or value == -math.inf:
        raise UserError(
            "there is no token to choose: the logits are not finite, or every token is excluded; "
            "see temperature and what else changes the logits"
        )
