"""Losses of an exit: sums and token counts, to be divided once, after every reduction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label that Hugging Face losses skip
# Logits alive at a time: 1 GiB in fp32. Each chunk adds to the whole head's gradient, so smaller
# ones cost time.
LOGITS = 2**28


@dataclass
class LossSum:
    """A loss as its sum over labelled tokens and their number."""

    total: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        """Masked mean; 0 where nothing is labelled."""
        return self.total / self.count.clamp(min=1)


def count_labels(labels: Tensor) -> Tensor:
    """How many tokens of (B, T) labels are predicted: a row's first has nothing before it."""
    return (labels[:, 1:] != IGNORED).sum()


def next_tokens(labels: Tensor) -> Tensor:
    """Labels (B, T) as each position's target; the last has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


class Softmax:
    """Softmax over logits that are all here; see `ee_tuning.parallel.tensor` for parts of them."""

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """(…, V) → (…, V)."""
        return F.log_softmax(logits, dim=-1)

    def normaliser(self, logits: Tensor) -> Tensor:
        """log Σ exp of all of them: (…, V) → (…, 1)."""
        return logits.logsumexp(-1, keepdim=True)

    def share(self, vocabulary: int) -> int:
        """How many of a vocabulary's logits are here."""
        return vocabulary

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """−log of the targets' probabilities: (N, V), (N,) → (N,), 0 where one is `IGNORED`."""
        found = self.log_probabilities(logits)
        return F.nll_loss(found, targets, ignore_index=IGNORED, reduction="none")

    def likeliest(self, logits: Tensor) -> Tensor:
        """The first of the largest: (…, V) → (…) int64."""
        return likeliest(logits)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all parts of the vocabulary of their `values`."""
        return values

    def confidence(self, logits: Tensor) -> Tensor:
        """Largest probability: (…, V) → (…)."""
        return confidence(logits)


SOFTMAX = Softmax()


def cross_entropy(
    logits: Tensor, labels: Tensor, dynamic: bool = False, softmax: Softmax = SOFTMAX
) -> LossSum:
    """Next-token cross-entropy of logits (B, T, V) against labels (B, T), in fp32.

    dynamic: multiply each token's loss by the exit's own confidence, detached (method of
    arXiv 2402.00518, section 3).
    """
    # The last position has no target, instead of its logits being cut off: they stay in one piece.
    logits, targets = logits.float().flatten(0, 1), next_tokens(labels)
    losses = softmax.cross_entropy(logits, targets.flatten())
    if dynamic:
        losses = losses * softmax.confidence(logits.detach())
    return LossSum(losses.sum(), count_labels(labels))


def distillation(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    dynamic: bool = False,
    softmax: Softmax = SOFTMAX,
) -> LossSum:
    """KL divergence from the final exit's distribution, on the labelled tokens, times T².

    logits, teacher: (B, T, V). The factor keeps the gradients' scale independent of the
    temperature (Hinton et al., arXiv 1503.02531).
    """
    mask = labels[:, 1:] != IGNORED
    student = softmax.log_probabilities(logits[:, :-1].float() / temperature)
    target = softmax.log_probabilities(teacher[:, :-1].float() / temperature)
    terms = F.kl_div(student, target, log_target=True, reduction="none").sum(-1)
    losses = softmax.sum(terms) * temperature**2
    if dynamic:
        losses = losses * softmax.confidence(logits[:, :-1].detach())
    return LossSum((losses * mask).sum(), mask.sum())


def rejection(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weight: float,
    dynamic: bool = False,
    softmax: Softmax = SOFTMAX,
) -> LossSum:
    """What a draft is rejected with, on the labelled tokens: 1 − Σ min(p, q).

    That is the probability in speculative sampling (arXiv 2211.17192), q being the logits' softmax
    and p the final exit's distribution. weight: its share; the rest is the cross-entropy against p,
    −Σ p log q, which has a gradient where p and q do not meet.

    logits: (B, T, V); teacher: log p of the same tokens, which need not be all there are.
    """
    mask = labels[:, 1:] != IGNORED
    student = softmax.log_probabilities(logits[:, :-1].float())
    target = teacher[:, :-1].exp()
    shared = softmax.sum(torch.minimum(target, student.exp()).sum(-1))
    surprise = softmax.sum(-(target * student).sum(-1))
    losses = weight * (1 - shared) + (1 - weight) * surprise
    if dynamic:
        losses = losses * softmax.confidence(logits[:, :-1].detach())
    return LossSum((losses * mask).sum(), mask.sum())


@dataclass(frozen=True)
class Objective:
    """What an exit is tuned on: see the settings of the same names in `TuneConfig`."""

    loss: str = "ce"
    kl_temperature: float = 1.0
    kl_weight: float = 0.5
    dynamic_weights: bool = False
    acceptance_weight: float = 2 / 3

    @property
    def is_plain(self) -> bool:
        """Whether it is cross-entropy without weights."""
        return self.loss == "ce" and not self.dynamic_weights

    @property
    def needs_teacher(self) -> bool:
        """Whether the final exit's logits are needed, and so the whole backbone."""
        return self.loss != "ce"

    def __call__(
        self, logits: Tensor, labels: Tensor, teacher: Tensor | None, softmax: Softmax = SOFTMAX
    ) -> LossSum:
        """Summed loss of logits (B, T, V) on labels (B, T); teacher: see `Teacher.logits`."""
        if self.loss == "acceptance":
            assert teacher is not None
            weights = self.acceptance_weight, self.dynamic_weights
            return rejection(logits, teacher, labels, *weights, softmax)
        terms = []
        if self.loss != "kl":
            weight = 1.0 if self.loss == "ce" else 1 - self.kl_weight
            terms.append((weight, cross_entropy(logits, labels, self.dynamic_weights, softmax)))
        if self.loss != "ce":
            assert teacher is not None
            weight = 1.0 if self.loss == "kl" else self.kl_weight
            args = (logits, teacher, labels, self.kl_temperature, self.dynamic_weights, softmax)
            terms.append((weight, distillation(*args)))
        total = torch.stack([weight * term.total for weight, term in terms]).sum()
        return LossSum(total, terms[0][1].count)


class Teacher:
    """The final exit's logits, without a graph, where and when an exit is compared with them."""

    def __init__(
        self,
        head: Callable[[Tensor], Tensor],
        hidden: Tensor,
        tokens: Tensor | None,
        softmax: Softmax | None = None,
        known: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """head: of the final exit; hidden: (B, T, H) after the last layer; tokens: (N,), those that
        the exits know, if their vocabulary is reduced. softmax: over all of the head's logits, to
        give logarithms of probabilities in place of logits. known: the final exit for `tokens`
        alone, where the head gives other parts of the vocabulary."""
        self._head, self._hidden, self._tokens, self._softmax = head, hidden, tokens, softmax
        self._known = known
        self._last: tuple[slice, Tensor] | None = None

    @torch.no_grad()
    def logits(self, positions: slice) -> Tensor:
        """At some positions: (B, t, V) or (B, t, N).

        The last ones are kept: where all tokens are one chunk, every exit asks for the same.
        """
        if self._last is None or self._last[0] != positions:
            self._last = None
            self._last = positions, self._logits(self._hidden[:, positions])
        return self._last[1]

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._known is not None:
            logits = self._known(hidden)
            if self._softmax is None:
                return logits
            return logits.float() - self._softmax.normaliser(self._head(hidden).float())
        logits = self._head(hidden)
        if self._softmax is not None:
            logits = self._softmax.log_probabilities(logits.float())
        return logits if self._tokens is None else logits.index_select(-1, self._tokens)


def chunks(labels: Tensor, vocabulary: int) -> list[slice]:
    """The positions of labels (B, T) in runs whose logits here are at most about `LOGITS` values.

    A run ends with the first position of the next: the losses of a run are those of all its
    positions but the last, which has nothing after it there.
    """
    batch, length = labels.shape
    size = max(1, LOGITS // (batch * vocabulary))
    return [slice(start, start + size + 1) for start in range(0, max(1, length - 1), size)]


# A vocabulary so large is looked at in so many pieces side by side: a GPU takes all of it at once,
# and what is found in a piece in one go.
LARGE, PIECES = 2**13, 64


def _pieces(logits: Tensor) -> Tensor | None:
    """Logits (…, V) as (…, pieces, V / pieces), where that is faster."""
    vocabulary = logits.shape[-1]
    if vocabulary < LARGE:
        return None
    if vocabulary % PIECES:
        logits = F.pad(logits, (0, -vocabulary % PIECES), value=-math.inf)
    return logits.unflatten(-1, (PIECES, -1))


def likeliest(logits: Tensor) -> Tensor:
    """The first of the largest of logits: (…, V) → (…) int64."""
    pieces = _pieces(logits)
    if pieces is None:
        return logits.argmax(-1)
    piece = pieces.amax(-1).argmax(-1, keepdim=True)
    return (piece * pieces.shape[-1] + pieces.argmax(-1).gather(-1, piece))[..., 0]


def confidence(logits: Tensor, measure: str = "probability") -> Tensor:
    """How sure logits are, between 0 and 1: (…, V) → (…) fp32.

    measure: ``probability``, the largest of the softmax; ``margin``, by how much it exceeds the
    second; ``entropy``, 1 − H / log V, H being the softmax's entropy and V the number of tokens
    that are known, those whose logits are finite.
    """
    logits = logits.float()
    if measure == "margin":
        first, second = logits.softmax(-1).topk(2).values.unbind(-1)
        return first - second
    if measure == "entropy":
        found = logits.log_softmax(-1)
        entropy = torch.special.entr(found.exp()).sum(-1)
        return 1 - entropy / logits.isfinite().sum(-1).clamp(min=2).log()
    pieces = _pieces(logits)
    if pieces is None:
        return logits.softmax(-1).amax(-1)
    # Of tokens none of which can follow, the largest logit is minus infinity.
    most = pieces.amax(-1)
    sums = torch.exp(pieces - _finite(most)[..., None]).sum(-1)
    top = most.amax(-1)
    base = _finite(top)
    return torch.exp(top - base) / (sums * torch.exp(most - base[..., None])).sum(-1)


def _finite(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits == -math.inf, 0)
