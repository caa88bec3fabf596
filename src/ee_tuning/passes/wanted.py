"""What a pass of decoding is given, what it is to give, and what it gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ee_tuning.backbone import State
from ee_tuning.exits import Exit
from ee_tuning.exits.head import Head
from ee_tuning.losses import confidence, likeliest
from ee_tuning.passes.cache import SlotCache
from ee_tuning.passes.draws import drawn, places_of


@dataclass
class Window:
    """Tokens of one sequence that a segment computes at once: its next `count` ones.

    ids: the tokens, where the segment is the first.
    """

    slot: int
    count: int
    ids: Sequence[int] = ()


IDLE = Window(0, 0)


def told(table: Sequence[Sequence[int]]) -> Tensor:
    """A table of what passes are told: in a quarter of the time that torch takes for lists."""
    return torch.from_numpy(np.array(table, dtype=np.int64))


def table_of(
    slots: Sequence[int], starts: Sequence[int], given: Mapping[int, Window], length: int
) -> list[list[int]]:
    """What passes are told of windows, by slot, that begin at `starts` of every slot, and of idle
    ones: slot, first position, number of tokens, and these, as many as `length`."""
    table = [[slot, starts[slot], 0] for slot in slots]
    for row in table:
        window = given.get(row[0], IDLE)
        row[2] = window.count
        row += [*window.ids, *[0] * (length - len(window.ids))]
    return table


def handed_on(table: Tensor, before: Tensor) -> Tensor:
    """What passes are told, (n, W), of which the device knows some: as it has it in `before`.

    table: (n, W + 1), of which the last column says which row is in this one's place: of the table,
    or behind its n rows one of `before` (m, W).
    """
    return torch.cat([table[:, :-1], before])[table[:, -1]]


@dataclass(frozen=True)
class Wanted:
    """What a pass is to predict.

    after: ``nothing``, ``last`` (what follows the last token of each window) or ``each``.
    final: by the final exit, not by the one that may sit at the same layer. measure: of
    confidence, see `ee_tuning.losses.confidence`. samples: in place of the likeliest tokens some
    are drawn, as `Passes.draws` and the numbers in `draws` say.
    """

    after: str
    final: bool
    measure: str = "probability"
    samples: int = 0


class Rows(NamedTuple):
    """What a prediction is for: windows in slots (n,), at positions (n, T), of counts (n,) tokens;
    draws: the table of `Draws`."""

    slots: Tensor
    positions: Tensor
    counts: Tensor
    draws: Tensor

    def places(self, after: str) -> Tensor:
        """The positions of the tokens after which is predicted, as of `Wanted`: (n, A)."""
        alone = after == "each" or self.positions.shape[1] == 1
        return self.positions if alone else self.positions[_lasts(self)][:, None]


class Predictor(NamedTuple):
    """What predicts: the final exit, see `Invariant.final`, the exit that may sit at the same
    layer, the state there, and the cache of a `layer` exit."""

    final: nn.Module
    exit: Exit | None
    state: State
    cache: SlotCache | None


@dataclass
class Predictions:
    """What follows the tokens of windows: after the last of each (A = 1), or after each.

    known: logits (n, A, N) fp32, good until the next pass, of all tokens or those that `head`
    knows. answers: (2, n, A), the likeliest token, or one that was drawn, and how sure; where that
    is a tensor, the device is waited for when the first of them is asked for, before the next pass.
    rows: the row of each window.
    """

    known: Tensor
    answers: Tensor | list[list[list[float]]]
    rows: list[int]
    head: Head | None = None

    @cached_property
    def _said(self) -> list[list[list[float]]]:
        found: Any = self.answers
        return found.tolist() if isinstance(found, Tensor) else found

    @property
    def tokens(self) -> list[list[float]]:
        """By row of `known`, then token."""
        return self._said[0]

    @property
    def confidences(self) -> list[list[float]]:
        """By row of `known`, then token."""
        return self._said[1]

    @property
    def logits(self) -> Tensor:
        """(n, A, V) fp32, good until the next pass."""
        return self.known if self.head is None else self.head.whole(self.known)

    def of(self, window: int, place: int) -> Prediction:
        """What follows one token of a window; its last one, if that is all there is."""
        row = self.rows[window]
        return self.at(row, min(place, len(self.tokens[row]) - 1))

    def at(self, row: int, place: int) -> Prediction:
        """What follows a token, by row, then token."""
        token, confidence = int(self.tokens[row][place]), self.confidences[row][place]
        return Prediction(token, confidence, self, row, place)


def verified(
    said: Tensor, logits: Tensor, answers: Tensor
) -> tuple[list[list[float]], Predictions]:
    """What a chain says (n, m), and what a pass to the end says to its drafts: of `predict`."""
    both = torch.cat([said.flatten(), answers.flatten()]).tolist()  # the one wait for the device
    first, (_, number, length), size = said.numel(), answers.shape, said.shape[1]
    lists = [both[at : at + length] for at in range(first, len(both), length)]
    rows = [both[at : at + size] for at in range(0, first, size)]
    return rows, Predictions(logits, [lists[:number], lists[number:]], [*range(number)])


@dataclass
class Prediction:
    """What follows a token: the likeliest one, or one that was drawn, how sure, and on demand all
    logits: those at `row` and `place` of `all` of the pass."""

    token: int
    confidence: float
    all: Predictions
    row: int
    place: int

    @property
    def logits(self) -> Tensor:
        """(V,) fp32, good until the next pass."""
        return self.all.logits[self.row, self.place]

    def earlier(self, back: int) -> Prediction:
        """What follows the token that is `back` before, of the same window."""
        return self.all.at(self.row, self.place - back)


@dataclass
class Read:
    """A prompt that was read into `slot`, or that the device is at: what follows, if that was
    wanted, and where a stage follows, the hidden states (P, H) behind the last segment; both good
    until the next pass.

    window: the prompt's, among those of `predictions`. sources: where a draft exit reads states
    after these layers, (1, P, n·H).
    """

    slot: int
    predictions: Predictions | None
    window: int
    hidden: Tensor | None
    sources: Tensor | None = None

    def keep(self) -> None:
        """Let what follows be good behind the next pass, too, once the device is there; not its
        logits."""
        if self.predictions is not None and isinstance(self.predictions.answers, Tensor):
            kept = self.predictions.answers.to("cpu", non_blocking=True, copy=True)
            self.predictions.answers = kept

    @property
    def found(self) -> Prediction | None:
        """What follows; the device is waited for."""
        return None if self.predictions is None else self.predictions.of(self.window, 0)


def predict(
    final: nn.Module,
    exit: Exit | None,
    state: State,
    cache: SlotCache | None,
    rows: Rows,
    wanted: Wanted,
) -> tuple[Tensor, Tensor] | None:
    """Logits (n, A, N) of the tokens that the exit knows, and (2, n, A): the likeliest tokens, or
    those drawn (exact in fp32 up to 2²⁴), and the confidence in the likeliest.

    final: see `Invariant.final`. A `layer` exit always keeps its K/V of all tokens.
    """
    features = state.hidden
    if exit is not None and (cache is not None or not wanted.final):
        features = exit.features(state, cache)
    if wanted.after == "nothing":
        return None
    features = state.hidden if wanted.final else features
    positions = rows.positions
    if wanted.after == "last" and positions.shape[1] > 1:
        at = _lasts(rows)
        features, positions = features[at][:, None], positions[at][:, None]
    head = None if exit is None or wanted.final else exit.output
    if head is None:
        known, tokens = final(inputs_embeds=features).logits.float(), None
    else:
        known, tokens = head.known_logits(features).float(), head.tokens
    found = likeliest(known)
    if wanted.samples:
        draws = rows.draws[rows.slots]
        place = places_of(draws, positions)
        found = drawn(known, found, draws, place, wanted.samples, tokens)
    found = found if tokens is None else tokens[found]
    return known, torch.stack([found.float(), confidence(known, wanted.measure)])


def newest(given: Predictor, rows: Rows) -> tuple[Predictor, Rows]:
    """What the final exit predicts after the last token of each window, from that alone."""
    at = _lasts(rows)
    state = replace(given.state, hidden=given.state.hidden[at][:, None])
    return given._replace(state=state), rows._replace(positions=rows.positions[at][:, None])


def _lasts(rows: Rows) -> tuple[Tensor, Tensor]:
    last = (rows.counts - 1).clamp(min=0)
    return torch.arange(len(last), device=last.device), last
