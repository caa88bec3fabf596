"""How many drafts a round has: what they cost and how many of them were kept decide."""

from __future__ import annotations

from bisect import bisect
from collections import deque


class Pace:
    """How long drafts may be: as long as brings the most tokens for the weights that are read.

    If each of n drafts is kept with probability a, a round gives (1 - aⁿ⁺¹) / (1 - a) tokens, and
    costs n · c + 1 passes at full depth, c being a draft's share of one (arXiv 2211.17192,
    equation 1 and theorem 3.8). Where no draft pays for itself, there are none for a while.
    """

    FORGETS = 0.95  # of what was seen, the share that is still counted a round later
    HOPE = 0.8  # the acceptance before any was seen, which counts as one draft

    def __init__(self, longest: int, cost: float) -> None:
        """longest: drafts at most. cost: of a draft, as a share of a pass at full depth."""
        self.longest, self.cost = longest, cost
        self._kept = self._tried = 0.0

    @property
    def acceptance(self) -> float:
        """The share of drafts that were kept, lately; none behind a rejected one was tried."""
        return (self._kept + self.HOPE) / (self._tried + 1)

    def learn(self, drafted: int, kept: int) -> None:
        """Take in that `kept` of `drafted` tokens were right."""
        self._kept = self.FORGETS * self._kept + kept
        self._tried = self.FORGETS * self._tried + min(drafted, kept + 1)

    def drafts(self, room: int, clock: Clock | None = None) -> int:
        """Drafts of the next round, if `room` more tokens are wanted: the last needs none.

        clock: what rounds really took, where that was measured.
        """
        known = {} if clock is None else clock.known
        best, found, tokens = 0.0, 0, 0.0
        acceptance = self.acceptance
        for number in range(max(0, min(self.longest, room - 1)) + 1):
            tokens += acceptance**number
            rate = tokens / _estimate(known or {0: 1.0}, number, self.cost)
            if rate > best:
                best, found = rate, number
        return found


class Steady(Pace):
    """As many drafts as may be, whether that pays or not."""

    def drafts(self, room: int, clock: Clock | None = None) -> int:
        """See `Pace`."""
        return max(0, min(self.longest, room - 1))


class Clock:
    """How long rounds took lately, by the number of their drafts.

    known: seconds, the middle of the last few; not of numbers that were not tried for long.
    """

    LATELY = 5  # rounds of a number
    FORGETS = 64  # rounds after which a number that was not tried is no longer known

    def __init__(self) -> None:
        self.known: dict[int, float] = {}
        self._seen: dict[int, deque[float]] = {}
        self._tried: dict[int, int] = {}
        self._rounds = 0

    def learn(self, number: int, seconds: float) -> None:
        """Take in a round of so many drafts."""
        self._rounds += 1
        seen = self._seen.setdefault(number, deque(maxlen=self.LATELY))
        seen.append(seconds)
        self.known[number], self._tried[number] = sorted(seen)[len(seen) // 2], self._rounds
        if self._rounds % self.FORGETS == 0:
            old = [k for k, tried in self._tried.items() if tried <= self._rounds - self.FORGETS]
            for one in old:
                del self.known[one], self._seen[one], self._tried[one]


def _estimate(known: dict[int, float], number: int, cost: float) -> float:
    """Seconds of a round with so many drafts, from those of the numbers that are known.

    On the line between its neighbours among these, or beyond them; where there is one alone, a
    draft has the share `cost` of a round without any.
    """
    if number in known:
        return known[number]
    if len(known) == 1:
        ((only, seconds),) = known.items()
        return seconds * (1 + number * cost) / (1 + only * cost)
    numbers = sorted(known)
    place = min(max(bisect(numbers, number), 1), len(numbers) - 1)
    before, after = numbers[place - 1], numbers[place]
    slope = max(0.0, (known[after] - known[before]) / (after - before))
    return max(known[after] - slope * (after - number), 0.1 * known[after])
