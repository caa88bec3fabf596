"""Tokens of one text on which the device decides alone, several between two looks of the host.

Where there is one text, a pass of a small model takes little longer than the host takes to look at
what was found, and to ask for the next one. So where there are graphs with branches, what a `Row`
knows is kept on the device for a while, in one vector, and so is the decision whether a token
leaves: it begins the next token, or opens the door to the next segment. The decisions are those of
`draft_round`, its twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ee_tuning.decode.draws import ALL
from ee_tuning.decode.graphs import compiled
from ee_tuning.decode.passes import Passes
from ee_tuning.decode.rounds import Rounds
from ee_tuning.decode.sampling import Chooser, Token, check_evidence
from ee_tuning.decode.sequences import Row
from ee_tuning.decode.settings import Policy
from ee_tuning.decode.wanted import Wanted
from ee_tuning.errors import UserError

TOKENS = 4  # between two looks: those behind a text's end are lost, and new texts wait
# What there is of a row: its slot, newest token, tokens, how many of them are pending and may be,
# and tokens since the last look; then, by segment, tokens that it has computed, and thresholds.
SLOT, NEWEST, LENGTH, PENDING, LIMIT, NUMBER, DONE = range(7)


class Ahead:
    """One row of an engine, as long as it is the only one and nothing of it is to be verified.

    Rows whose policy or chooser has rules of its own are not served.
    """

    def __init__(self, passes: Passes, stops: Sequence[int]) -> None:
        """stops: the layer at which each segment ends. rounds: where it has drafts of a draft exit,
        for rows that `serves` serves."""
        self.passes, self._stops, device = passes, stops, passes.device
        # Integers are exact in fp64, as are confidences.
        self._state = torch.zeros(DONE + 2 * len(stops), dtype=torch.float64, device=device)
        self._said = torch.zeros(TOKENS, 3, dtype=torch.float64, device=device)
        self._goes_on = torch.zeros(1, dtype=torch.int32, device=device)
        chains = passes.chains
        # With --tp each draft is told by the first process, between passes.
        alone = passes.group is None
        self.rounds = Rounds(passes, chains) if alone and chains is not None else None
        self._enter = compiled(_enter, passes.compile)
        self._decide = compiled(_decide, passes.compile)

    def serves(self, rows: Sequence[Row]) -> bool:
        """Whether these rows can be left to the device."""
        if len(rows) != 1:
            return False
        policy, chooser = rows[0].policy, rows[0].request.chooser
        own = type(policy).leaves is not Policy.leaves or type(chooser) is not Chooser
        return not (own or rows[0].door or not chooser.in_passes)

    @torch.inference_mode()
    def go_on(self, row: Row, count: int) -> list[Token]:
        """The next tokens of a row, up to `count` ≤ `TOKENS`; none, if there is no first one, but
        the error of its request. None leaves early if none may be pending."""
        policy, count = row.policy, min(count, row.left)
        exits = policy.thresholds if row.limit else {}
        asks = [layer in exits for layer in self._stops[: row.through]]
        thresholds = [policy.thresholds.get(layer, math.inf) for layer in self._stops]
        done = row.done + [0] * (len(self._stops) - row.through)
        told = torch.tensor(
            [row.slot, row.ids[-1], len(row.ids), row.pending, row.limit, 0, *done, *thresholds],
            dtype=torch.float64,
        )

        def begin() -> None:
            self._state.copy_(told, non_blocking=True)

        end, in_order = len(row.ids) + count, self.passes.in_order([row.slot])
        samples = row.request.chooser.samples
        run = self._tokens(asks, row.limit, end, in_order, policy, samples, begin)
        begin()
        for _ in range(count):
            run()
        tokens: list[Token] = []
        for number, i, confidence in self._said[:count].tolist():
            try:
                check_evidence(confidence)
            except UserError as error:
                if not tokens:  # else what came before it is settled first
                    row.request.error = error
                break
            tokens.append(_take(row, int(number), self._stops[int(i)], int(i), confidence))
        return tokens

    def _tokens(
        self, asks: list[bool], limit: int, end: int, in_order: bool, policy: Policy,
        samples: int, begin: Callable[[], Any],
    ) -> Callable[[], None]:  # fmt: skip
        """What lets the device go on by one token.

        asks: of each segment that the text goes through, whether a token may leave behind it. end:
        how long it may become before the next look. begin: sets the state.
        """
        passes = self.passes
        # Where no token leaves, every segment has one at a time to compute.
        length = limit + 1 if any(asks) else 1
        if passes.compile:
            length = passes.sizes.length(length)
        reach = passes.sizes.reach(end + length) if passes.compile else end + length
        in_order = in_order and passes.compile  # else its first position is looked at on the host
        key = "ahead", *asks, length, reach, in_order, policy.measure, policy.final, samples
        steps = self._steps(asks, (length, reach, in_order), policy, samples)
        tune = passes.invariant.missing is not None
        return passes.graphs.branched(key, steps, self._goes_on, begin, tune)

    def _steps(
        self, asks: list[bool], sizes: tuple[int, int, bool], policy: Policy, samples: int
    ) -> list[Callable[[], None]]:
        """What runs before each decision, with it."""
        steps: list[Callable[[], None]] = []
        first, last = 0, len(asks) - 1
        for i, asked in enumerate(asks):
            if asked or i == last:
                final = i == last and policy.final
                wanted = Wanted("last", final, policy.measure, samples)
                steps.append(partial(self._step, range(first, i + 1), i == last, wanted, sizes))
                first = i + 1
        return steps

    def _step(
        self, segments: range, ends: bool, wanted: Wanted, sizes: tuple[int, int, bool]
    ) -> None:
        """Some segments, after the last of which it is decided whether the token leaves."""
        length, reach, in_order = sizes
        control, nothing = self.passes.control[:1], Wanted("nothing", False, wanted.measure)
        for i in segments:
            self._enter(self._state, control, i)
            asked = wanted if i == segments[-1] else nothing
            size = length if i else 1
            found = self.passes.forward(i, 1, size, reach, in_order, asked)
        answers = found[1][:, 0, 0]
        self._decide(self._state, self._said, self._goes_on, answers, segments[-1], ends)

    @torch.inference_mode()
    def warm_up(self, limit: int, measures: Sequence[str], samples: int = 0) -> None:
        """Capture what texts of mode ``threshold`` with all exits, and of ``full``, ask for.

        limit: tokens that may be pending. samples: see `draws`. A text must not be in progress.
        """
        last, sizes = len(self._stops) - 1, self.passes.sizes
        told = torch.zeros_like(self._state)
        for measure, leave, end in product(measures, {False, last > 0}, sizes.ends(limit + 1)):
            policy = Policy(self._stops[-1], measure=measure)
            asks = [leave and i < last for i in range(last + 1)]
            in_order = self.passes.in_order([0])
            begin = partial(self._state.copy_, told)
            self._tokens(asks, limit, end, in_order, policy, samples, begin)
        if self.rounds is not None:
            self.rounds.warm_up(measures, (min(samples, ALL), samples))


def _take(row: Row, number: int, layer: int, i: int, confidence: float) -> Token:
    """A row goes on with a token that has come from segment `i`, which ends at `layer`."""
    row.done[: i + 1] = [len(row.ids)] * (i + 1)
    if row.is_last(i):
        token = Token(number, row.policy.end, confidence)
        row.keep(0, number)
    else:
        token = Token(number, layer, confidence)
        row.leave(token)
    return token


def _enter(state: Tensor, control: Tensor, i: int) -> None:
    """Tell segment `i` what to compute, as `Passes` has it, and take it for computed.

    state: see above, (6 + 2 · segments,). control: (1, 3 + tokens).
    """
    end = state[DONE + i - 1] if i else state[LENGTH]
    start = state[DONE + i].clone()
    told = [state[SLOT], start, end - start, *([] if i else [state[NEWEST]])]
    control[0, : len(told)] = torch.stack(told).long()
    state[DONE + i] = end


def _decide(
    state: Tensor, said: Tensor, goes_on: Tensor, answers: Tensor, i: int, ends: bool
) -> None:
    """Whether the token leaves behind segment `i`, where it does so in any case if that `ends`.

    answers: (2,), what follows and how sure that is. If it leaves, it is `said` (tokens, 3), with
    segment and confidence, and the state is that of the next token; else the state stays.
    """
    token, sure = answers.double()
    segments = (len(state) - DONE) // 2
    leaves = torch.ones_like(token, dtype=torch.bool)
    if not ends:
        leaves = (sure >= state[DONE + segments + i]) & (state[PENDING] < state[LIMIT])
    place = torch.arange(len(said), device=said.device) == state[NUMBER]
    line = torch.stack([token, torch.full_like(token, i), sure])
    said.copy_(torch.where((place & leaves)[:, None], line, said))
    goes_on.copy_((~leaves)[None])
    pending = torch.zeros_like(token) if ends else state[PENDING] + 1
    begun = [state[SLOT], token, state[LENGTH] + 1, pending, state[LIMIT], state[NUMBER] + 1]
    state[:DONE] = torch.where(leaves, torch.stack(begun), state[:DONE])
