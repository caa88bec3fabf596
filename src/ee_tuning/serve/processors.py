"""What changes logits, or looks at them, in the way of transformers' processors.

Each sees the text of one sequence, ids (1, L), and scores (1, V).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

NEVER = -9999.0  # the log probability that stands for none: JSON has no infinity


@dataclass
class Likely:
    """How likely a token was, and the likeliest ones: their log probabilities."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Seen(LogitsProcessor):
    """Keeps what was said of each token, before anything changes it."""

    def __init__(self, top: int) -> None:
        self.top = top
        self._rows: dict[int, Tensor] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are."""
        self._rows[input_ids.shape[1]] = scores[0].float().log_softmax(-1)
        return scores

    def take(self, position: int, token: int) -> Likely:
        """What was said last of the token at a position of the text."""
        return likely(self._rows.pop(position)[None], [token], self.top)[0]


def likely(logprobs: Tensor, tokens: Sequence[int], top: int) -> list[Likely]:
    """Of log probabilities (T, V), those of `tokens` (T) and of the `top` likeliest."""
    chosen = torch.tensor(tokens, device=logprobs.device)[:, None]
    own = logprobs.gather(-1, chosen)[:, 0].clamp(min=NEVER).tolist()
    values, ids = logprobs.topk(min(top, logprobs.shape[-1]), -1)
    rows = zip(tokens, own, ids.tolist(), values.clamp(min=NEVER).tolist(), strict=True)
    return [Likely(token, p, [*zip(i, v, strict=True)]) for token, p, i, v in rows]


class Penalties(LogitsProcessor):
    """OpenAI's penalties: of tokens that were written, and per time that they were.

    What the prompt has does not count.
    """

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores without the penalties."""
        counts = Counter(input_ids[0, self.prompt :].tolist())
        if not counts:
            return scores
        ids = torch.tensor([*counts], device=scores.device)
        times = torch.tensor([*counts.values()], device=scores.device, dtype=scores.dtype)
        return scores.index_add(-1, ids, -(self.presence + self.frequency * times)[None])


class Bias(LogitsProcessor):
    """Adds to the scores of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.ids, self.values = torch.tensor([*bias]), torch.tensor([*bias.values()])[None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with the bias."""
        self.ids, self.values = self.ids.to(scores.device), self.values.to(scores.device)
        return scores.index_add(-1, self.ids, self.values.to(scores.dtype))


class NotYet(LogitsProcessor):
    """Tokens that may not come before a text has a length."""

    def __init__(self, length: int, tokens: Sequence[int]) -> None:
        self.length, self.tokens = length, torch.tensor([*tokens])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores without these."""
        if input_ids.shape[1] >= self.length:
            return scores
        self.tokens = self.tokens.to(scores.device)
        return scores.index_fill(-1, self.tokens, -torch.inf)
