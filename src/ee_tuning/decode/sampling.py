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
from typing import Any

import torch
from torch import Tensor

from ee_tuning.decode.passes import Prediction
from ee_tuning.errors import UserError


@dataclass
class Token:
    """A token of a sequence, the layer at which it was predicted, and the confidence there.

    ends: it is the last one of its text.
    """

    id: int
    exit_layer: int
    confidence: float
    ends: bool = False
    probabilities: Tensor | None = None  # (V,), of a sampled token, until it is settled


class Chooser:
    """Chooses tokens from logits as transformers does.

    generator: of the samples; default: torch's own. drawn: how many it has given.
    """

    def __init__(self, processors: Any = (), sample: bool = False) -> None:
        self.processors, self.sample = processors, sample
        self.generator: torch.Generator | None = None
        self.drawn = 0

    def choose(self, ids: Sequence[int], found: Prediction) -> tuple[int, Tensor | None]:
        """What follows `ids` by a prediction: a token, and its distribution (V,) if sampled."""
        if not self.sample and not len(self.processors):
            _check_evidence(found.confidence)
            return found.token, None
        scores = self._scores(ids, found.logits)
        if not self.sample:
            return _token(scores.argmax(), scores.amax()), None
        probabilities = scores.softmax(-1)
        return self._draw(probabilities), probabilities

    def catch_up(self, drawn: int, like: Tensor) -> None:
        """Leave out the draws before the `drawn`-th, from (V,) like these: others made them."""
        while self.sample and self.drawn < drawn:
            self._noise(like)

    def verify(
        self, ids: Sequence[int], found: Sequence[Prediction], drafts: Sequence[Token]
    ) -> tuple[int, int]:
        """How many of the drafts that `ids` end with are kept, and the token that follows them.

        found: the final exit's prediction of each draft, and of what follows the last one.
        """
        first = len(ids) - len(drafts)
        texts = [ids[: first + kept] for kept in range(len(drafts))]
        if self.sample and drafts:
            return self._verify_samples([*texts, ids], found, drafts)
        for kept, draft in enumerate(drafts):
            token, _ = self.choose(texts[kept], found[kept])
            if token != draft.id:
                return kept, token
        return len(drafts), self.choose(ids, found[-1])[0]

    def _verify_samples(
        self, texts: list[Sequence[int]], found: Sequence[Prediction], drafts: Sequence[Token]
    ) -> tuple[int, int]:
        """As `verify`, of all drafts at once, so that the host waits for them once.

        texts: what each prediction follows.
        """
        pairs = zip(texts[:-1], found[:-1], strict=True)
        p = torch.stack([self._scores(text, one.logits) for text, one in pairs]).softmax(-1)
        q = torch.stack([draft.probabilities for draft in drafts])  # type: ignore[misc]
        chosen = torch.tensor([[draft.id] for draft in drafts], device=p.device)
        uniform = torch.rand(chosen.shape, dtype=p.dtype, device=p.device, generator=self.generator)
        keeps = (uniform * q.gather(1, chosen) < p.gather(1, chosen)).flatten().tolist()
        if all(keeps):
            return len(drafts), self.choose(texts[-1], found[-1])[0]
        kept = keeps.index(False)
        rest = (p[kept] - q[kept]).clamp(min=0)
        return kept, self._draw(torch.where(rest.sum() > 0, rest, p[kept]))

    def _draw(self, weights: Tensor) -> int:
        """A token, each as likely as its share of the weights (V,).

        The same that `torch.multinomial` draws, which waits for the device twice to look at the
        weights.
        """
        return _token((weights / self._noise(weights)).argmax(), weights.sum())

    def _noise(self, like: Tensor) -> Tensor:
        self.drawn += 1
        return torch.empty_like(like).exponential_(generator=self.generator)

    def _scores(self, ids: Sequence[int], logits: Tensor) -> Tensor:
        if not len(self.processors):
            return logits
        # A processor may write into what it is given.
        return self.processors(torch.tensor([ids], device=logits.device), logits[None].clone())[0]


def _token(index: Tensor, evidence: Tensor) -> int:
    """A token's index on the host, in one wait; exact up to 2²⁴.

    Raises:
        UserError: the score or weight that speaks for it is no number, or minus infinity.
    """
    token, value = torch.stack([index.float(), evidence.float()]).tolist()
    _check_evidence(value)
    return int(token)


def _check_evidence(value: float) -> None:
    if math.isnan(value) or value == -math.inf:
        raise UserError(
            "there is no token to choose: the logits are not finite, or every token is excluded; "
            "see temperature and what else changes the logits"
        )


class Generators:
    """Generators for the samples of a stream's rows.

    The first row that samples has torch's own, so that a single prompt is continued as by
    transformers. Each of the others has one for itself: no row's samples depend on how fast another
    one is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rows = device, 0
        on_gpu = device.type == "cuda"
        self._state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
        self._seeds = torch.Generator()

    def give(self, chooser: Chooser) -> None:
        """Give the next row's to its chooser, if it samples."""
        chooser.generator, chooser.drawn = None, 0
        if not chooser.sample:
            return
        self.rows += 1
        if self.rows == 2:
            # One number of torch's own, and no more: the next stream will come across the others.
            copied = torch.Generator(self.device)
            copied.set_state(self._state)
            self._seeds.manual_seed(_seed(copied))
        if self.rows > 1:
            chooser.generator = torch.Generator(self.device).manual_seed(_seed(self._seeds))

    def close(self) -> None:
        """Move torch's own on, if it has seeded others, which the next stream's shall not equal."""
        if self.rows > 1:
            torch.rand((), device=self.device)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), device=generator.device, generator=generator))
