"""One sequence, one token at a time, with transformers' growing caches: what the engine must equal.

Each segment has an *inbox*: the hidden states of tokens it has not computed yet. A token goes down
the segments until an exit lets it leave; what it leaves behind waits in the next segment's inbox
and is computed there together with the next token that gets so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ee_tuning import EarlyExitModel
from ee_tuning.backbone import Segment, State
from ee_tuning.losses import confidence

# Whether a token leaves at an exit, from the exit's layer and its confidence there.
Policy = Callable[[int, float], bool]


class SegmentCache(Cache):
    """The K/V cache of a run of layers, seen by a trunk that owns only these."""

    def __init__(self, model: EarlyExitModel, segment: Segment) -> None:
        layers = DynamicCache(config=model.backbone.config).layers
        super().__init__(layers=layers[segment.start : segment.stop])
        self.first = segment.start

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        return super().update(keys, values, layer_idx - self.first, *args, **kwargs)


@dataclass
class Token:
    """The prediction of one step: logits (1, V), the layer it left at, its confidence there."""

    logits: Tensor
    exit_layer: int
    confidence: float


class Decoder:
    """The state of one sequence being generated: K/V caches and inboxes of all segments.

    exit_layers: the active exits, by depth. end: the layer every token stops at, the backbone's
    last one or an exit. max_pending: how many tokens may leave before the next one has to go all
    the way. policy: which tokens leave at an exit before `end`.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        exit_layers: list[int],
        end: int,
        max_pending: int,
        policy: Policy,
    ) -> None:
        self.model = model
        self.pending = 0  # tokens that left since the last one that went all the way
        self.policy = policy
        self.max_pending = max_pending
        self.end = end
        self.segments = model.segments(exit_layers, last=end)
        self.caches = [SegmentCache(model, segment) for segment in self.segments]
        blocks = {k: model.exit(k).segment for k in exit_layers}
        self.exit_caches = {k: block and SegmentCache(model, block) for k, block in blocks.items()}
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
        self.pending = 0
        return self._token(self.model.backbone.final_logits(window[:, -1:]), self.end)

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


@dataclass
class Round:
    """A chain of drafts, how sure each was, and how many of them the end agreed with."""

    drafts: list[int]
    confidences: list[float]
    kept: int


@torch.inference_mode()
def draft_loop(
    model: EarlyExitModel, ids: list[int], new: int, longest: int, bar: float, measure: str
) -> tuple[list[int], list[Round]]:
    """`new` greedy tokens after `ids` with the draft exit, and the rounds that brought them.

    A chain has up to `longest` drafts, no more than the text needs, and ends with the one at which
    the product of its confidences falls below `bar`. Everything is computed from scratch.
    """
    draft = model.draft
    assert draft is not None
    assert draft.norm is not None
    text, rounds = [*ids, _said(model, ids)[-1]], []
    while len(text) < len(ids) + new:
        zeros = torch.zeros(1, 1, len(draft.sources) * model.backbone.config.hidden_size)
        states = torch.cat([zeros, _sources(model, text[:-1])], dim=1)
        cache = SegmentCache(model, draft.segment)
        # Where no token looks back at the first one, it might as well not be there.
        start = 0 if draft.sees_first else 1
        settled, places = torch.tensor([text[start:]]), _positions(start, len(text))
        found = draft.first_step(settled, states[:, start:], places, cache)
        hidden, sure = found[:, -1:], 1.0
        one = Round([], [], 0)
        while len(one.drafts) < min(longest, len(ids) + new - len(text) - 1):
            logits = draft.logits(draft.norm(hidden))[0, -1]
            one.drafts.append(int(logits.argmax()))
            one.confidences.append(confidence(logits, measure).item())
            sure *= one.confidences[-1]
            if sure < bar:
                break
            position = len(text) + len(one.drafts) - 1
            token, place = torch.tensor([one.drafts[-1:]]), _positions(position, position + 1)
            hidden = draft.later_step(token, hidden, place, cache)
        said = _said(model, text + one.drafts)[len(text) - 1 :]
        while one.kept < len(one.drafts) and one.drafts[one.kept] == said[one.kept]:
            one.kept += 1
        text += said[: one.kept + 1]
        rounds.append(one)
    return text, rounds


def _said(model: EarlyExitModel, ids: list[int]) -> list[int]:
    """What the backbone says to follow each token of a text."""
    logits = model(torch.tensor([ids]), output_logits=True).logits
    return logits[0].argmax(-1).tolist()


def _sources(model: EarlyExitModel, ids: list[int]) -> Tensor:
    """The hidden states (1, T, n·H) after the draft exit's sources."""
    assert model.draft is not None
    hidden, found = torch.tensor([ids]), []
    for segment in model.segments([], sources=model.draft.sources):
        hidden = segment(hidden, _positions(0, len(ids))).hidden
        if segment.stop in model.draft.sources:
            found.append(hidden)
    return torch.cat(found, dim=-1)


def _positions(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop)[None]
