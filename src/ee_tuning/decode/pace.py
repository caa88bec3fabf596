"""How many drafts a round has: what they cost and how many of them were kept decide."""

from __future__ import annotations


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

    def drafts(self, room: int) -> int:
        """Drafts of the next round, if `room` more tokens are wanted: the last needs none."""
        best, found, tokens = 0.0, 0, 0.0
        for number in range(max(0, min(self.longest, room - 1)) + 1):
            tokens += self.acceptance**number
            rate = tokens / (number * self.cost + 1)
            if rate > best:
                best, found = rate, number
        return found
