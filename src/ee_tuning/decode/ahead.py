"""Tokens of one text on which the device decides alone, several between two looks of the host.

Where there is one text, a pass of a small model takes little longer than the host takes to look at
what was found, and to ask for the next one. So where there are graphs with branches, what a `Row`
knows is kept on the device for a while, in one vector, and so is the decision whether a token
leaves: it begins the next token, or opens the door to the next segments. The decisions are those of
`draft_round`, its twin.

The segments up to the next exit that is asked are a *step*. Where no token before the newest one
waits for a step, it computes that one alone; else a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ee_tuning.decode.cache import Place, waiting
from ee_tuning.decode.draws import ALL, bisects
from ee_tuning.decode.graphs import compiled
from ee_tuning.decode.passes import Passes
from ee_tuning.decode.rounds import Rounds
from ee_tuning.decode.sampling import Chooser, Token
from ee_tuning.decode.sequences import Row
from ee_tuning.decode.settings import Policy
from ee_tuning.decode.wanted import Predictor, Rows, Wanted, predict

TOKENS = 4  # between two looks: those behind a text's end are lost, and new texts wait
# What there is of a row: its slot, newest token, tokens, how many of them are pending and may be,
# tokens since the last look, which pieces run next, and of each token since then: it, the segment
# behind which it left, confidence; then, by segment, tokens that it has computed, and thresholds.
SLOT, NEWEST, LENGTH, PENDING, LIMIT, NUMBER, GOES_ON, SAID = range(8)
DONE = SAID + 3 * TOKENS
# What may run next: nothing, a step with the newest token alone, or with more.
ONE, MORE = 1, 2


class Asking(NamedTuple):
    """Where a text may leave, and what is asked there.

    asks: of each segment that it goes through, whether a token may leave behind it. keeps: whether
    the exit there, though not asked, needs its K/V later. length: tokens of the longest window.
    reach, in_order: see `Place`. samples: see `draws`.
    """

    asks: tuple[bool, ...]
    keeps: tuple[bool, ...]
    length: int
    reach: int
    in_order: bool
    measure: str
    final: bool
    samples: int

    def steps(self) -> list[range]:
        """The segments of each step."""
        last = len(self.asks) - 1
        stops = [i + 1 for i, asked in enumerate(self.asks) if asked or i == last]
        return [range(*cut) for cut in zip([0, *stops], stops, strict=False)]


class Newest:
    """The newest token, as passes of it alone are told of it.

    What steps share lies in memory of its own: a tensor of a captured step has no numbers when the
    next one is captured. slots: (1,), id: (1, 1), int64.
    """

    def __init__(self, passes: Passes) -> None:
        caches = [*passes.caches, *passes.exit_caches.values()]
        sizes = {layer.size for cache in caches for layer in cache.slot_layers}
        self.slots, self._limit = passes.control[:1, 0], passes.limit

        def number() -> Tensor:
            return torch.zeros(1, 1, dtype=torch.int64, device=passes.device)

        self.id, self._position, self._limited = number(), number(), number()
        self._places = {size: number() for size in sorted(sizes)}
        self._enter = compiled(_enter, passes.compile)

    def read(self, state: Tensor) -> None:
        """Find what it is in the state of `Ahead`."""
        told = self.slots, self.id, self._position, self._limited
        self._enter(state, *told, self._places, self._limit)

    def place(self, reach: int, in_order: bool) -> Place:
        """Its place."""
        place = Place(self.slots, self._position, reach, in_order)
        place.know(self._places)
        return place

    def position_ids(self) -> Tensor:
        """Its position (1, 1): a new tensor each time, since what is made of positions is kept for
        one tensor."""
        return self._limited.view(1, 1)


class Ahead:
    """One row of an engine, as long as it is the only one and nothing of it is to be verified.

    Rows whose policy or chooser has rules of its own are not served.
    """

    def __init__(self, passes: Passes, stops: Sequence[int]) -> None:
        """stops: the layer at which each segment ends. rounds: where it has drafts of a draft exit,
        or of its own, for rows that `serves` serves."""
        self.passes, self._stops, device = passes, stops, passes.device
        # Integers are exact in fp64, as are confidences.
        self._state = torch.zeros(DONE + 2 * len(stops), dtype=torch.float64, device=device)
        self._newest = Newest(passes)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        chains = passes.chains
        # With --tp each draft is told by the first process, between passes.
        drafts = passes.group is None and (chains is not None or passes.texts)
        self.rounds = Rounds(passes, chains) if drafts else None
        self._open = compiled(_open, passes.compile)
        self._wait = compiled(waiting, passes.compile)
        self._ask = compiled(_ask, passes.compile)
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
        thresholds = [policy.thresholds.get(layer, math.inf) for layer in self._stops]
        done = row.done + [0] * (len(self._stops) - row.through)
        head = [row.slot, row.ids[-1], len(row.ids), row.pending, row.limit]
        said = [0] * (DONE - len(head))
        told = torch.tensor([*head, *said, *done, *thresholds], dtype=torch.float64)

        def begin() -> None:
            self._state.copy_(told, non_blocking=True)

        end, in_order = len(row.ids) + count, self.passes.in_order([row.slot])
        samples = row.request.chooser.samples
        size = row.through, row.limit, end, in_order
        run = self._tokens(self._asking(policy, size, samples), begin)
        begin()
        for _ in range(count):
            run()
        lines = self._state[SAID : SAID + 3 * count].view(count, 3)
        tokens: list[Token] = []
        for number, i, confidence in row.evident(lines.tolist()):
            tokens.append(_take(row, int(number), self._stops[int(i)], int(i), confidence))
        return tokens

    def _asking(self, policy: Policy, size: tuple[int, int, int, bool], samples: int) -> Asking:
        """What a text of a policy asks for.

        size: segments that it goes through, tokens that may be pending, how long it may become
        before the next look, and whether its slot is looked at where it is.
        """
        through, limit, end, in_order = size
        passes, stops = self.passes, self._stops[:through]
        leaves = [layer in policy.thresholds for layer in stops]
        asks = [one and limit > 0 for one in leaves]
        keeps = [
            one and layer in passes.exit_caches for one, layer in zip(leaves, stops, strict=True)
        ]
        # Where no token leaves, every segment has one at a time to compute.
        length = limit + 1 if any(asks) else 1
        if passes.compile:
            length = passes.sizes.length(length)
        reach = passes.sizes.reach(end + length) if passes.compile else end + length
        in_order = in_order and passes.compile  # else its first position is looked at on the host
        how = policy.measure, policy.final, samples
        return Asking(tuple(asks), tuple(keeps), length, reach, in_order, *how)

    def _tokens(self, asking: Asking, begin: Callable[[], Any]) -> Callable[[], None]:
        """What lets the device go on by one token. begin: sets the state."""
        graphs, tune = self.passes.graphs, self.passes.invariant.missing is not None
        goes_on = self._state[GOES_ON : GOES_ON + 1]
        steps = self._steps(asking)
        return graphs.branched(("ahead", asking), steps, goes_on, begin, tune)

    def _steps(self, asking: Asking) -> list[list[Callable[[], None]]]:
        """By step, what computes the newest token alone and, behind the first, what more."""
        steps: list[list[Callable[[], None]]] = []
        for segments in asking.steps():
            steps.append([partial(self._alone, segments, asking)])
            if segments.start:
                steps[-1].append(partial(self._more, segments, asking))
        return steps

    def _alone(self, segments: range, asking: Asking) -> None:
        """A step of the newest token alone."""
        newest, ring = self._newest, self.passes.ring(segments.start)
        if ring is None:
            newest.read(self._state)
        place = newest.place(asking.reach, asking.in_order)
        hidden = newest.id if ring is None else self._wait(ring, place.slots, place.positions)
        self._step(segments, asking, hidden, newest.position_ids(), place, self._one)

    def _more(self, segments: range, asking: Asking) -> None:
        """A step of all tokens that wait for it."""
        slots, ring = self._newest.slots, self.passes.ring(segments.start)
        assert ring is not None
        size = segments.start, asking.length, self.passes.limit
        positions, position_ids, counts, hidden = self._open(self._state, slots, ring, *size)
        place = Place(slots, positions, asking.reach, asking.in_order)
        self._step(segments, asking, hidden, position_ids, place, counts)

    def _step(
        self, segments: range, asking: Asking, hidden: Tensor, position_ids: Tensor,
        place: Place, counts: Tensor,
    ) -> None:  # fmt: skip
        """Some segments, behind which it is decided whether the token leaves, where it does so in
        any case if there are no more."""
        passes, last = self.passes, segments[-1]
        ends = last == len(asking.asks) - 1
        rows = Rows(place.slots, place.positions, counts, passes.draws.table)
        for i in segments:
            state = passes.through(i, hidden, position_ids, place)
            hidden = state.hidden
            if asking.keeps[i] and not asking.asks[i]:
                passes.predict(*passes.predictor(i, state, place), rows, Wanted("nothing", False))
        if not ends:
            passes.rings.keep(last + 1, place.slots, place.positions, hidden)
        wanted = Wanted("last", ends and asking.final, asking.measure, asking.samples)
        predictor = passes.predictor(last, state, place, wanted.final)
        told = segments[0], last, ends
        if passes.group is None and not bisects(wanted.samples):
            self._ask(predictor, rows, wanted, self._state, told)
        else:  # what the first process found is told to all before, or the compiler takes long
            found = passes.asked(predictor, rows, wanted)
            assert found is not None
            self._decide(self._state, found[1][:, 0, 0], told)

    def to_warm(
        self, limit: int, measures: Sequence[str], samples: Sequence[int]
    ) -> list[Callable[[], Any]]:
        """What captures all that texts of mode ``threshold`` with all exits, and of ``full``, ask
        for; see `ee_tuning.decode.warm`. limit: tokens that may be pending."""
        leaves = sorted({False, len(self._stops) > 1})
        ends = self.passes.sizes.ends(limit + 1)
        every = product(samples, measures, leaves, ends)
        jobs: list[Callable[[], Any]] = [partial(self._warm, limit, *one) for one in every]
        if self.rounds is not None:
            jobs += self.rounds.to_warm(measures, [(min(kind, ALL), kind) for kind in samples])
        return jobs

    def _warm(self, limit: int, samples: int, measure: str, leave: bool, end: int) -> None:
        told = torch.zeros_like(self._state)
        told[LENGTH] = 1
        inner = self._stops[:-1] if leave else []
        policy = Policy(self._stops[-1], dict.fromkeys(inner, 0.0), measure)
        size = len(self._stops), limit, end, self.passes.in_order([0])
        self._tokens(self._asking(policy, size, samples), partial(self._state.copy_, told))


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


def _enter(
    state: Tensor, slots: Tensor, id: Tensor, position: Tensor, limited: Tensor,
    places: Mapping[int, Tensor], limit: int,
) -> None:  # fmt: skip
    """Say what the newest token is, at which position, that up to `limit`, and at which place of
    slots with so many."""
    at = state[LENGTH].long() - 1
    slots.copy_(state[SLOT].long())
    id.copy_(state[NEWEST].long())
    position.copy_(at)
    limited.copy_(at.clamp(max=limit))
    for size, place in places.items():
        place.copy_(at % size)


def _open(
    state: Tensor, slots: Tensor, ring: Tensor, i: int, length: int, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What waits for segment `i`, in a window of so many tokens: positions (1, T), these up to
    `limit`, how many there are (1,), and their hidden states (1, T, H)."""
    first = state[DONE + i].long()
    counts = (state[LENGTH].long() - first)[None]
    positions = (first + torch.arange(length, device=state.device))[None]
    return positions, positions.clamp(max=limit), counts, waiting(ring, slots, positions)


def _ask(
    predictor: Predictor, rows: Rows, wanted: Wanted, state: Tensor, step: tuple[int, int, bool]
) -> None:
    """Ask what follows the last token of a window, and decide. step: see `_decide`."""
    found = predict(*predictor, rows, wanted)
    assert found is not None
    _decide(state, found[1][:, 0, 0], step)


def _decide(state: Tensor, answers: Tensor, step: tuple[int, int, bool]) -> None:
    """Whether the token leaves behind a step, of which `state` is told.

    answers: (2,), what follows and how sure that is. step: its first and last segment, and whether
    the token ends there. If it leaves, it is said, with segment and confidence, and the state is
    that of the next token.
    """
    token, sure = answers.double()
    (first, last, ends), segments = step, (len(state) - DONE) // 2
    length, index = state[LENGTH], torch.arange(len(state), device=state.device)
    begun = {NEWEST: token, LENGTH: length + 1, NUMBER: state[NUMBER] + 1}
    if ends:
        leaves, goes_on = torch.ones_like(token, dtype=torch.bool), torch.zeros_like(token)
        begun[PENDING] = goes_on
    else:
        leaves = (sure >= state[DONE + segments + last]) & (state[PENDING] < state[LIMIT])
        more = length - state[DONE + last + 1] > 1
        goes_on = torch.where(more, MORE, ONE).double().masked_fill(leaves, 0)
        begun[PENDING] = state[PENDING] + 1
    new = torch.where((index >= DONE + first) & (index <= DONE + last), length, state)
    new = torch.where(index == GOES_ON, goes_on, new)
    for place, value in begun.items():
        new = torch.where((index == place) & leaves, value, new)
    line = SAID + 3 * state[NUMBER]
    for place, said in enumerate((token, torch.full_like(token, last), sure)):
        new = torch.where((index == line + place) & leaves, said, new)
    state.copy_(new)
