"""Drafts from the text itself: what followed its last tokens where they first came (prompt lookup).

As transformers' `PromptLookupCandidateGenerator` finds them: of the last n tokens, n from `MATCH`
down to 1, the first place in the text counts at which the same n stand, and of the tokens after
these as many as are wanted and there.
"""

from __future__ import annotations

from collections.abc import Sequence

from ee_tuning.decode.pace import Pace

HOPES = (0.2, 0.5, 0.8)  # the chance of a first draft behind 1, 2, … tokens, before much is seen
MATCH = len(HOPES)  # tokens that are looked for, at most
COST = 0.05  # of a draft that is only verified, as a share of a round, likewise


class Lookup:
    """Where in one text runs of up to `match` tokens came first; it is told what the text grew by
    as it is asked, so that asking takes as long as that is."""

    def __init__(self, match: int = MATCH) -> None:
        self.match = match
        self._after: dict[tuple[int, ...], int] = {}  # of runs of tokens, the place behind them
        self._known = 0  # places that are among these

    def find(self, ids: Sequence[int]) -> tuple[int, int]:
        """How many of the last tokens of `ids`, which begin as those of the call before, were found
        before, and the place behind these; 0, if none was."""
        # What follows the last run is not known yet.
        for place in range(self._known + 1, len(ids)):
            for size in range(1, min(self.match, place) + 1):
                self._after.setdefault(tuple(ids[place - size : place]), place)
        self._known = max(self._known, len(ids) - 1)
        for size in range(min(self.match, len(ids) - 1), 0, -1):
            if first := self._after.get(tuple(ids[-size:])):
                return size, first
        return 0, 0


class TextDrafts(Pace):
    """The drafts of one text, and what they have brought it in rounds that had some.

    Of those behind so many tokens that were found it is seen for itself, since the more are found,
    the likelier they go on as before. What trying may cost comes on top of what exits may: it is
    half as much.
    """

    STAKE, SHARE, BOUND = Pace.STAKE / 2, Pace.SHARE / 2, Pace.BOUND / 2

    def __init__(self, longest: int) -> None:
        """longest: drafts at most."""
        super().__init__(longest, COST)
        self._lookup = Lookup()
        self._seen = [[[0.0] * longest for _ in range(4)] for _ in HOPES]

    def drafts(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`; from now on it is about such drafts."""
        size, place = self._lookup.find(ids)
        if not size:
            return []
        self.hope = HOPES[size - 1]
        self._tried, self._kept, self._asked, self._limited = self._seen[size - 1]
        return list(ids[place : place + max(0, min(most, self.longest))])
