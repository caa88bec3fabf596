"""One decoding step, for every mode.

Each segment has an *inbox*: the hidden states of tokens it has not computed yet. A token goes
down the segments until an exit lets it leave; what it leaves behind waits in the next segment's
inbox and is computed there together with the next token that gets so far. That is KV
recomputation (arXiv 2312.04916) of the missing layers only, and nothing else is needed: full
depth is decoding in which no token leaves, a fixed depth is a model that ends at an exit. In
self-speculation what left is a draft: the next token that goes all the way brings the final logits
of all that waited, and drafts that they reject are taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ee_tuning.backbone import State
from ee_tuning.losses import confidence

if TYPE_CHECKING:
    from ee_tuning.model import EarlyExitModel

# Whether a token leaves at an exit, from the exit's layer and its confidence there.
Policy = Callable[[int, float], bool]


@dataclass
class Token:
    """The prediction of one step: logits, the layer it left at, its confidence there.

    logits: (1, V); of a decoder that verifies, at the end (N + 1, V): those of the N tokens that
    left since the last full pass, which predict what came after each, and of the newest.
    """

    logits: Tensor
    exit_layer: int
    confidence: float


class Decoder:
    """The state of one sequence being generated: K/V caches and inboxes of all segments.

    exit_layers: the active exits, by depth. end: the layer every token stops at, the backbone's
    last one or an exit. max_pending: how many tokens may leave before the next one has to go all
    the way. policy: which tokens leave at an exit before `end`. verifies: see `Token`.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        exit_layers: list[int],
        end: int,
        max_pending: int,
        policy: Policy,
        verifies: bool = False,
    ) -> None:
        self.model = model
        self.verifies = verifies
        self.pending = 0  # tokens that left since the last one that went all the way
        self.policy = policy
        self.max_pending = max_pending
        self.end = end
        self.segments = model.segments(exit_layers, last=end)
        self.caches = [segment.new_cache(verifies) for segment in self.segments]
        self.exit_caches = {k: model.exit(k).new_cache(verifies) for k in exit_layers}
        self.inboxes: list[Tensor | None] = [None for _ in self.segments]
        self.lengths = [0 for _ in self.segments]

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Token:
        """Read a prompt (1, T). It fills every cache, so its last token goes to the end, too."""
        return self._descend(input_ids, may_leave=False)

    @torch.inference_mode()
    def step(self, input_ids: Tensor) -> Token:
        """Read one token (1, 1) and predict the next."""
        return self._descend(input_ids, may_leave=True)

    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens, at a time when none is pending."""
        assert self.pending == 0
        self.lengths = [length - count for length in self.lengths]
        for cache in (*self.caches, *self.exit_caches.values()):
            for layer in cache.layers if cache is not None and count else ():
                layer.crop(-count)  # type: ignore[union-attr]

    def _descend(self, window: Tensor, may_leave: bool) -> Token:
        """Send the newest tokens down the segments until their last one leaves."""
        for i, segment in enumerate(self.segments):
            state = self._run(i, window)
            window = state.hidden
            if segment.stop not in self.exit_caches:
                continue
            exit = self.model.exit(segment.stop)
            features = exit.features(state, self.exit_caches[segment.stop])[:, -1:]
            if segment.stop == self.end:
                return self._token(exit.logits(features), self.end)
            if may_leave and self.pending < self.max_pending:
                token = self._token(exit.logits(features), segment.stop)
                if self.policy(segment.stop, token.confidence):
                    self.inboxes[i + 1] = _joined(self.inboxes[i + 1], window)
                    self.pending += 1
                    return token
        asked = 1 + self.pending if self.verifies else 1
        self.pending = 0
        return self._token(self.model.backbone.final_logits(window[:, -asked:]), self.end)

    def _run(self, i: int, window: Tensor) -> State:
        """Segment `i` on what waits in its inbox and on `window`: (1, T) ids or (1, T, H)."""
        waiting, self.inboxes[i] = self.inboxes[i], None
        window = _joined(waiting, window)
        first, self.lengths[i] = self.lengths[i], self.lengths[i] + window.shape[1]
        position_ids = torch.arange(first, self.lengths[i], device=window.device)[None]
        return self.segments[i](window, position_ids, self.caches[i])

    def _token(self, logits: Tensor, layer: int) -> Token:
        logits = logits[0].float()
        return Token(logits, layer, confidence(logits[-1]).item())


def _joined(waiting: Tensor | None, window: Tensor) -> Tensor:
    """`window` after what was waiting before it."""
    return window if waiting is None else torch.cat([waiting, window], dim=1)
