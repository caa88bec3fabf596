"""Where the tokens of a text that is there already would have left, had it been decoded.

One pass over the text gives what decoding would have seen: what leaves early is computed later, and
exactly, so no token sees where those before it left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ee_tuning.decode.settings import Policy
from ee_tuning.losses import confidence
from ee_tuning.passes.wanted import Prediction, Predictions


def exits_before_end(policy: Policy) -> list[int]:
    """The layers at which tokens are said for good before the end; drafts are verified there."""
    return [] if policy.verifies else list(policy.thresholds)


def predictions(logits: Tensor, measure: str) -> Predictions:
    """What an exit says of texts: logits (B, T, V) fp32, row by row. measure: of confidence."""
    answers = [logits.argmax(-1).tolist(), confidence(logits, measure).tolist()]
    return Predictions(logits, answers, [])


class Given:
    """The tokens of one text, one after another.

    As in decoding, the first one goes to the end, and so does the one after `Policy.max_pending`
    that left in a row.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.pending = policy.start(), policy.max_pending

    def layer(self, said: Mapping[int, Prediction], ids: Sequence[int]) -> int:
        """Where the token that follows `ids` leaves.

        said: what the exits before the end predict of it, by layer, in order of depth.
        """
        policy, layer = self.policy, self.policy.end
        if self.pending < policy.max_pending:
            layer = next((k for k in said if policy.leaves(k, said[k], ids)), policy.end)
        self.pending = 0 if layer == policy.end else self.pending + 1
        return layer
