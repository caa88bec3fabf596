"""Losses of an exit: sums and token counts, to be divided once, after every reduction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label that Hugging Face losses skip


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


def cross_entropy(logits: Tensor, labels: Tensor, dynamic: bool = False) -> LossSum:
    """Next-token cross-entropy of logits (B, T, V) against labels (B, T), in fp32.

    dynamic: multiply each token's loss by the exit's own confidence, detached (method of
    arXiv 2402.00518, section 3).
    """
    # The last position has no target, instead of its logits being cut off: they stay in one piece.
    logits, targets = logits.float().flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
    if dynamic:
        losses = losses * confidence(logits.detach())
    return LossSum(losses.sum(), count_labels(labels))


def distillation(
    logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float, dynamic: bool = False
) -> LossSum:
    """KL divergence from the final exit's distribution, on the labelled tokens, times T².

    logits, teacher: (B, T, V). The factor keeps the gradients' scale independent of the
    temperature (Hinton et al., arXiv 1503.02531).
    """
    mask = labels[:, 1:] != IGNORED
    student = F.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    target = F.log_softmax(teacher[:, :-1].float() / temperature, dim=-1)
    losses = F.kl_div(student, target, log_target=True, reduction="none").sum(-1) * temperature**2
    if dynamic:
        losses = losses * confidence(logits[:, :-1].detach())
    return LossSum((losses * mask).sum(), mask.sum())


def confidence(logits: Tensor) -> Tensor:
    """Largest softmax probability: (…, V) → (…)."""
    logits = logits.float()
    return torch.exp(logits.amax(-1) - logits.logsumexp(-1))
