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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ee_tuning.decode.alone import (
    DONE,
    GOES_ON,
    LENGTH,
    LIMIT,
    MORE,
    NEWEST,
    NUMBER,
    ONE,
    PENDING,
    SAID,
    TOKENS,
    Newest,
)
from ee_tuning.decode.rounds import Line, Rounds
from ee_tuning.decode.sampling import Chooser, Token
from ee_tuning.decode.sequences import Row
from ee_tuning.decode.settings import Policy
from ee_tuning.model import Network
from ee_tuning.passes.branches import can_branch
from ee_tuning.passes.cache import Place, waiting
from ee_tuning.passes.draws import ALL, bisects
from ee_tuning.passes.graphs import Beside, compiled
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.wanted import Predictor, Rows, Wanted, predict
from ee_tuning.slices import group_of

# Layers beside which an exit is asked: about as long as that takes. It takes none of the time of
# layers of few bytes, which is that of their kernels one after the other.
BESIDE, FEW = 2, 32 << 20


def cuts_beside(model: Network, exit_layers: Sequence[int]) -> list[int]:
    """The layers behind which it is looked at what an exit before has said meanwhile: none, where
    layers take as long as their weights do, or where there are no branches of graphs."""
    backbone, layers = model.backbone, [k for k in exit_layers if k > 0]
    if not layers or backbone.device.type != "cuda" or not can_branch():
        return []
    layer, last = backbone.layers[-1], backbone.num_layers
    size = sum(p.numel() * p.element_size() for p in layer.parameters())
    few = size <= FEW and group_of(layer) is None
    cuts = [(k + BESIDE, min((one for one in layers if one > k), default=last)) for k in layers]
    return [cut for cut, following in cuts if few and cut < following]


class Asking(NamedTuple):
    """Where a text may leave, and what is asked there.

    asks: of each segment that it goes through, whether a token may leave behind it. beside: whether
    that is asked beside the next one, and looked at behind that. keeps: whether the exit there,
    though not asked, needs its K/V later. length: tokens of the longest window. reach, in_order:
    see `Place`. samples: see `passes.draws`.
    """

    asks: tuple[bool, ...]
    beside: tuple[bool, ...]
    keeps: tuple[bool, ...]
    length: int
    reach: int
    in_order: bool
    measure: str
    final: bool
    samples: int

    def steps(self) -> list[Step]:
        """All of a token."""
        end = len(self.asks) - 1
        asked = [i for i, one in enumerate(self.asks) if one and i < end]
        stops = [0, *(i + 1 + self.beside[i] for i in asked), end + 1]
        cuts = zip(pairwise(stops), [*asked, end], strict=True)
        return [Step(start, stop, at, at == end) for (start, stop), at in cuts]


class Step(NamedTuple):
    """What runs before the next decision: segments `start` to `stop` − 1, and what is asked behind
    segment `asked` of them. ends: whether the token leaves in any case."""

    start: int
    stop: int
    asked: int
    ends: bool


class Look(NamedTuple):
    """Tokens of a row that the device finds while the host does not look.

    length: tokens of the text before them. number: of them. at: of the first one, of `TOKENS`. run:
    finds one. line: where they are read.
    """

    row: Row
    length: int
    number: int
    at: int
    asking: Asking
    run: Callable[[], None]
    line: Line

    def begun(self) -> Look:
        """Let the device find them: itself."""

        def find() -> None:
            for _ in range(self.number):
                self.run()

        self.line.follow(find)
        return self

    def read(self) -> tuple[list[list[float]], float]:
        """Of each token it, the segment behind which it left, and confidence; and all seconds."""
        said, seconds = self.line.read()
        return said[self.at : self.at + self.number], seconds


class Ahead:
    """One row of an engine, as long as it is the only one and nothing of it is to be verified.

    Rows whose policy or chooser has rules of its own are not served.
    """

    def __init__(self, passes: Passes, stops: Sequence[int]) -> None:
        """stops: the layer at which each segment ends. rounds: of a row that drafts, for those that
        both this and they serve."""
        self.passes, self._stops, device = passes, stops, passes.device
        # Integers are exact in fp64, as are confidences.
        self._state = torch.zeros(DONE + 2 * len(stops), dtype=torch.float64, device=device)
        self._newest = Newest(passes)
        self._lines = [Line(self._state[SAID:DONE].view(TOKENS, 3)) for _ in range(2)]
        self._behind: Look | None = None  # that was begun before the one in front of it was over
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._beside = Beside(device)
        # With --tp each draft is told by the first process, between passes.
        drafts = passes.group is None and (passes.chains or passes.texts or passes.exits)
        self.rounds = Rounds(passes) if drafts and passes.most > 1 else None
        self._open = compiled(_open, passes.compile)
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
    def go_on(self, row: Row, count: int, behind: bool = False) -> tuple[list[Token], float]:
        """The next tokens of a row, up to `count` ≤ `TOKENS`, or what is `underway`, and seconds
        that they took; none, if there is no first one, but the error of its request. None leaves
        early if none may be pending. behind: as many more are begun before the host looks at these.
        """
        look = self.underway(row) or self._begin(row, min(count, row.left))
        self._behind = None
        if behind and row.left > look.number:
            self._behind = self._follow(look, min(count, row.left - look.number))
        found, seconds = look.read()
        tokens: list[Token] = []
        for number, i, confidence in row.evident(found):
            computed = int(i) + 1 + look.asking.beside[int(i)]
            tokens.append(_take(row, int(number), self._stops[int(i)], computed, confidence))
        return tokens, seconds

    def underway(self, row: Row) -> Look | None:
        """What the device is at for a row, or has found, if the row has gone no other way since."""
        look = self._behind
        return look if look and look.row is row and look.length == len(row.ids) else None

    def _begin(self, row: Row, count: int) -> Look:
        """The first look at a row: the device is told of it."""
        thresholds = [row.policy.thresholds.get(layer, math.inf) for layer in self._stops]
        done = row.done + [0] * (len(self._stops) - row.through)
        head = [row.slot, row.ids[-1], len(row.ids), row.pending, row.limit]
        said = [0] * (DONE - len(head))
        told = torch.tensor([*head, *said, *done, *thresholds], dtype=torch.float64)

        def begin() -> None:
            self._state.copy_(told, non_blocking=True)

        size = row.through, row.limit, len(row.ids) + count, self.passes.sizes.in_order([row.slot])
        asking = self._asking(row.policy, size, row.request.chooser.samples)
        run = self._tokens(asking, begin)
        begin()
        return Look(row, len(row.ids), count, 0, asking, run, self._lines[0]).begun()

    def _follow(self, look: Look, count: int) -> Look | None:
        """A look behind another, if it asks for the same: what else a row asks for stays."""
        length, at = look.length + look.number, (look.at + look.number) % TOKENS
        if self._reach(length + count, look.asking.length) != look.asking.reach:
            return None
        line = self._lines[look.line is self._lines[0]]
        return look._replace(length=length, number=count, at=at, line=line).begun()

    def _reach(self, end: int, length: int) -> int:
        """Up to where a window of so many tokens looks back, in a text up to `end`."""
        return self.passes.sizes.reach(end + length) if self.passes.compile else end + length

    def _asking(self, policy: Policy, size: tuple[int, int, int, bool], samples: int) -> Asking:
        """What a text of a policy asks for.

        size: segments that it goes through, tokens that may be pending, how long it may become
        before the next look, and whether its slot is looked at where it is.
        """
        through, limit, end, in_order = size
        passes, stops = self.passes, self._stops[:through]
        leaves = [layer in policy.thresholds for layer in stops]
        asks = [one and limit > 0 for one in leaves]
        # Where there is no exit behind the next segment, and that is not the last one.
        quiet = [layer not in passes.exits for layer in stops[1:-1]] + [False, False]
        beside = [one and quiet[i] for i, one in enumerate(asks)]
        keeps = [
            one and layer in passes.exit_caches for one, layer in zip(leaves, stops, strict=True)
        ]
        # Where no token leaves, every segment has one at a time to compute.
        length = limit + 1 if any(asks) else 1
        if passes.compile:
            length = passes.sizes.length(length, 1)
        reach = self._reach(end, length)
        in_order = in_order and passes.compile  # else its first position is looked at on the host
        how = policy.measure, policy.final, samples
        each = tuple(asks), tuple(beside), tuple(keeps)
        return Asking(*each, length, reach, in_order, *how)

    def _tokens(self, asking: Asking, begin: Callable[[], Any]) -> Callable[[], None]:
        """What lets the device go on by one token. begin: sets the state."""
        graphs, tune = self.passes.graphs, self.passes.invariant.missing is not None
        goes_on = self._state[GOES_ON : GOES_ON + 1]
        steps = partial(self._steps, asking)
        return graphs.branched(("ahead", asking), steps, goes_on, begin, tune)

    def _steps(self, asking: Asking) -> list[list[Callable[[], None]]]:
        """By step, what computes the newest token alone and, behind the first, what more."""
        steps: list[list[Callable[[], None]]] = []
        for step in asking.steps():
            steps.append([partial(self._alone, step, asking)])
            if step.start:
                steps[-1].append(partial(self._more, step, asking))
        return steps

    def _alone(self, step: Step, asking: Asking) -> None:
        """A step of the newest token alone."""
        newest, ring = self._newest, self.passes.ring(step.start)
        if ring is None:
            newest.read(self._state)
        place = newest.place(asking.reach, asking.in_order)
        hidden = newest.id if ring is None else newest.hidden
        given = hidden, newest.position_ids(), place, self._one, newest.hidden
        self._step(step, asking, *given)

    def _more(self, step: Step, asking: Asking) -> None:
        """A step of all tokens that wait for it."""
        slots, ring = self._newest.slots, self.passes.ring(step.start)
        assert ring is not None
        size = step.start, asking.length, self.passes.limit
        positions, position_ids, counts, hidden = self._open(self._state, slots, ring, *size)
        place = Place(slots, positions, asking.reach, asking.in_order)
        for places in self._newest.sizes:  # now: nobody waits for what another stream finds
            place.remembered((places,), Place.in_ring)
        self._step(step, asking, hidden, position_ids, place, counts)

    def _step(
        self, step: Step, asking: Asking, hidden: Tensor, position_ids: Tensor, place: Place,
        counts: Tensor, newest: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Some segments, behind which it is decided whether the token leaves. newest: where what
        they give is kept, too."""
        passes = self.passes
        rows = Rows(place.slots, place.positions, counts, passes.draws.table)
        final = step.ends and asking.final
        wanted = Wanted("last", final, asking.measure, asking.samples)
        for i in range(step.start, step.stop):
            state = passes.through(i, hidden, position_ids, place)
            hidden = state.hidden
            if asking.keeps[i] and not asking.asks[i]:
                passes.predict(*passes.predictor(i, state, place), rows, Wanted("nothing", False))
            if i == step.asked:
                predictor = passes.predictor(i, state, place, final)
                with self._beside.work() if i < step.stop - 1 else nullcontext():
                    self._say(predictor, rows, wanted, step)
        if step.asked < step.stop - 1:
            self._beside.await_it()  # an exit may read what is kept of the newest token
        if not step.ends:
            passes.rings.keep(step.stop, place.slots, place.positions, hidden, newest)

    def _say(self, predictor: Predictor, rows: Rows, wanted: Wanted, step: Step) -> None:
        """Whether the token leaves. Nothing of the step reads the state any more."""
        if self.passes.group is None and not bisects(wanted.samples):
            self._ask(predictor, rows, wanted, self._state, step)
            return
        # With --tp told to all before; or the compiler takes long.
        found = self.passes.asked(predictor, rows, wanted)
        assert found is not None
        self._decide(self._state, found[1][:, 0, 0], step)

    def to_warm(
        self, limit: int, measures: Sequence[str], samples: Sequence[int], drafts: bool, texts: bool
    ) -> list[Callable[[], Any]]:
        """What captures all that texts of mode ``threshold`` with all exits, and of ``full``, ask
        for; see `ee_tuning.passes.warm`. limit: tokens that may be pending. drafts: whether texts
        draft with exits at layers, too. texts: whether by what they have themselves."""
        leaves = sorted({False, bool(self.passes.exits)})
        ends = self.passes.sizes.ends(limit + 1)
        every = product(samples, measures, leaves, ends)
        jobs: list[Callable[[], Any]] = [partial(self._warm, limit, *one) for one in every]
        if self.rounds is not None:
            kinds = [(min(kind, ALL), kind) for kind in samples]
            jobs += self.rounds.to_warm(measures, kinds, drafts, texts)
        return jobs

    def _warm(self, limit: int, samples: int, measure: str, leave: bool, end: int) -> None:
        told = torch.zeros_like(self._state)
        told[LENGTH] = 1
        inner = [k for k in self._stops[:-1] if leave and k in self.passes.exits]
        policy = Policy(self._stops[-1], dict.fromkeys(inner, 0.0), measure)
        size = len(self._stops), limit, end, self.passes.sizes.in_order([0])
        self._tokens(self._asking(policy, size, samples), partial(self._state.copy_, told))


def _take(row: Row, number: int, layer: int, computed: int, confidence: float) -> Token:
    """A row goes on with a token that has come from `layer`, when so many segments had computed
    the one before it."""
    row.done[:computed] = [len(row.ids)] * computed
    if row.is_last(computed - 1):
        token = Token(number, row.policy.end, confidence)
        row.keep(0, number)
    else:
        token = Token(number, layer, confidence)
        row.leave(token)
    return token


def _open(
    state: Tensor, slots: Tensor, ring: Tensor, i: int, length: int, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What waits for segment `i`, in a window of so many tokens: positions (1, T), these up to
    `limit`, how many there are (1,), and their hidden states (1, T, H)."""
    first = state[DONE + i].long()
    counts = (state[LENGTH].long() - first)[None]
    positions = (first + torch.arange(length, device=state.device))[None]
    return positions, positions.clamp(max=limit), counts, waiting(ring, slots, positions)


def _ask(predictor: Predictor, rows: Rows, wanted: Wanted, state: Tensor, step: Step) -> None:
    """Ask what follows the last token of a window, and decide."""
    found = predict(*predictor, rows, wanted)
    assert found is not None
    _decide(state, found[1][:, 0, 0], step)


def _decide(state: Tensor, answers: Tensor, step: Step) -> None:
    """Whether the token leaves behind a step, of which `state` is told.

    answers: (2,), what follows and how sure that is. If it leaves, it is said, with the segment
    that was asked and the confidence, and the state is that of the next token.
    """
    token, sure = answers.double()
    segments = (len(state) - DONE) // 2
    length, index = state[LENGTH], torch.arange(len(state), device=state.device)
    begun = {NEWEST: token, LENGTH: length + 1, NUMBER: (state[NUMBER] + 1) % TOKENS}
    if step.ends:
        leaves, goes_on = torch.ones_like(token, dtype=torch.bool), torch.zeros_like(token)
        begun[PENDING] = goes_on
    else:
        leaves = (sure >= state[DONE + segments + step.asked]) & (state[PENDING] < state[LIMIT])
        more = length - state[DONE + step.stop] > 1
        goes_on = torch.where(more, MORE, ONE).double().masked_fill(leaves, 0)
        begun[PENDING] = state[PENDING] + 1
    computed = (index >= DONE + step.start) & (index < DONE + step.stop)
    new = torch.where(computed, length, state)
    new = torch.where(index == GOES_ON, goes_on, new)
    for place, value in begun.items():
        new = torch.where((index == place) & leaves, value, new)
    line = SAID + 3 * state[NUMBER]
    for place, said in enumerate((token, torch.full_like(token, step.asked), sure)):
        new = torch.where((index == line + place) & leaves, said, new)
    state.copy_(new)
