"""How long a text takes whose tokens leave where an exit is sure, from what rounds cost.

The text is known, the backbone's own, and so is what the exit says before each of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ee_tuning.decode.pace import Clock, Pace, count, plan


@dataclass(frozen=True)
class Heard:
    """What an exit says before each token of a text but its first: how sure it is of the likeliest
    token, and whether that is the one that follows."""

    sure: list[float]
    right: list[bool]

    def __len__(self) -> int:
        return len(self.sure)

    def drafts(self, at: int, threshold: float, most: int) -> tuple[int, int]:
        """How many of up to `most` drafts are made from place `at` on, and the first ones right."""
        made = _run(self.sure, at, threshold, most)
        return made, _run([float(right) for right in self.right], at, 1.0, made)


@dataclass(frozen=True)
class Chains(Heard):
    """The same of a draft exit: of the chain that begins at each of these places, what it says of
    its first tokens, `chains[at][j]`, as long as all before were right; the first is in `sure`."""

    chains: list[list[tuple[float, bool]]]

    def drafts(self, at: int, threshold: float, most: int) -> tuple[int, int]:
        """A chain ends with the draft at which the product of how sure it was falls below."""
        certain, made = 1.0, 0
        for sure, _ in self.chains[at][:most]:
            if made and certain < threshold:
                break
            certain, made = certain * sure, made + 1
        rights = [float(right) for _, right in self.chains[at]]
        return made, _run(rights, 0, 1.0, made)


@dataclass(frozen=True)
class Costs:
    """Seconds of decoding with an exit.

    rounds: by the number of tokens that leave in one and whether the exit was asked once more, in
    vain, before one goes to the end. prompt: of a call for the first token alone. stops: a round
    whose drafts end early takes no longer than one that may have no more. paced: the `Pace` knows.
    asks: a draft that is none is asked for, too.
    """

    rounds: Mapping[tuple[int, bool], float]
    prompt: float
    stops: bool = True
    paced: bool = True
    asks: bool = True

    def round(self, number: int, asked: bool) -> float:
        """Of a round in which so many tokens leave: on the line between what was measured."""
        known = sorted(n for n, was_asked in self.rounds if was_asked == asked)
        low = max((n for n in known if n <= number), default=known[0])
        high = min((n for n in known if n >= number), default=known[-1])
        a, b = self.rounds[low, asked], self.rounds[high, asked]
        return a if low == high else a + (b - a) * (number - low) / (high - low)


@dataclass(frozen=True)
class Told:
    """What becomes of texts. tokens: generated. seconds: that they take. ends: tokens that went to
    the end. agreement: share of the tokens that are the backbone's own."""

    tokens: int
    seconds: float
    ends: int
    agreement: float


def drafted(
    texts: Sequence[Heard], threshold: float, longest: int, cost: float, costs: Costs
) -> Told:
    """Mode ``speculative``: rounds of drafts, as many as `plan` lets them have.

    threshold: of a draft exit, its bar. cost: of a draft, as `ee_tuning.costs.draft_cost` has it.
    """
    seconds, tokens, ends, clock = 0.0, 0, 0, Clock(cost)
    for text in texts:
        pace, at, number = Pace(longest, cost, costs.paced), 0, len(text)
        seconds, tokens, ends = seconds + costs.prompt, tokens + number + 1, ends + 1
        while at < number:
            most = min(plan([pace], [number - at], clock), number - at - 1)
            drafts, kept = text.drafts(at, threshold, most)
            made = drafts if costs.stops else most
            took = costs.round(made, asked=costs.asks and drafts < most)
            pace.learn(most, drafts, kept)
            count(clock, [pace], pace.asked, took)
            seconds, at, ends = seconds + took, at + kept + 1, ends + 1
    return Told(tokens, seconds, ends, 1.0)


def left(texts: Sequence[Heard], threshold: float, longest: int, costs: Costs) -> Told:
    """Mode ``threshold``: what leaves stays, and is taken to change nothing of what follows."""
    seconds, tokens, ends, wrong = 0.0, 0, 0, 0
    for text in texts:
        at, number = 0, len(text.sure)
        seconds, tokens, ends = seconds + costs.prompt, tokens + number + 1, ends + 1
        while at < number:
            run = _run(text.sure, at, threshold, longest)
            wrong += text.right[at : at + run].count(False)
            seconds += costs.round(run, asked=run < longest)
            at, ends = at + run + 1, ends + 1
    return Told(tokens, seconds, ends, 1 - wrong / max(1, tokens))


def _run(values: Sequence[float], at: int, least: float, most: int) -> int:
    """How many of `values` from place `at` on are at least `least`, up to `most`."""
    run = 0
    while run < most and at + run < len(values) and values[at + run] >= least:
        run += 1
    return run
