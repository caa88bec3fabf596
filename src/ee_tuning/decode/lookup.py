"""Drafts from the text itself: what followed its last tokens where they first came (prompt lookup).

As transformers' `PromptLookupCandidateGenerator` finds them: of the last n tokens, n from `MATCH`
down to 1, the first place in the text counts at which the same n stand, and of the tokens after
these as many as are wanted and there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.decode.pace import Pace

# The chance of a first draft, before much is seen: of a round of which it is not known yet what it
# finds, then behind 1, 2, … tokens.
HOPES = (0.35, 0.2, 0.5, 0.8)
MATCH = len(HOPES) - 1  # tokens that are looked for, at most
COST = 0.05  # of a draft that is only verified, as a share of a round, likewise
COST_BEHIND = 0.02  # the same where the device goes on alone: its passes are all of one size


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


class Limits(NamedTuple):
    """Drafts of a round at most: of the exit, and of the text behind 0, 1, … tokens that are found
    again; behind 0 there are none."""

    exit: int = 0
    texts: tuple[int, ...] = (0,) * (MATCH + 1)

    @property
    def most(self) -> int:
        """Of either."""
        return max(self.exit, *self.texts)

    def within(self, room: int) -> Limits:
        """These, where there is room for so many."""
        if room >= self.most:
            return self
        room = max(0, room)
        return Limits(min(self.exit, room), tuple(min(one, room) for one in self.texts))


class Looked(NamedTuple):
    """What a text has: (1,) each, how many of its last tokens were found, and how many drafts there
    are; these (1, k)."""

    size: Tensor
    number: Tensor
    drafts: Tensor


def find(text: Tensor, length: Tensor, match: int = MATCH) -> tuple[Tensor, Tensor]:
    """As `Lookup.find`, of text (N,) of which the first `length` (1,) tokens are there: (1,) each.

    Every place is compared with the last one: the tokens there, those before, and so on.
    """
    number, last = len(text), length - 1
    index = torch.arange(number, device=text.device)
    alike, sizes = index < last, torch.zeros_like(index)
    for back in range(match):
        token = text[(last - back).clamp(min=0)]
        alike = alike & (index >= back) & (F.pad(text, (back, 0))[:number] == token)
        sizes = sizes + alike
    # The most tokens, and of the places with these the first.
    best = (sizes * number + (number - 1 - index)).amax(0, keepdim=True)
    return best // number, number - best % number


def look(text: Tensor, table: Tensor, limits: Tensor, looked: Looked) -> None:
    """Take in the window of `table` (1, 4 + T), which is the end of `text` (N,), and find drafts.

    limits: (`MATCH` + 1,), as of `Limits`.
    """
    first, count, window = table[0, 1:2], table[0, 2:3], table[0, 4:]
    later = torch.arange(len(text), device=text.device) - first
    own = window[later.clamp(0, len(window) - 1)]
    known = torch.where((later >= 0) & (later < count), own, text)
    text.copy_(known)
    length, most = first + count, looked.drafts.shape[1]
    size, place = find(known, length)
    places = place + torch.arange(most, device=text.device)
    looked.size.copy_(size)
    looked.number.copy_(torch.minimum(limits[size], length - place))
    looked.drafts.copy_(known[places.clamp(max=len(text) - 1)])


class TextDrafts(Pace):
    """The drafts of one text, and what they have brought it in rounds that had some.

    Of those behind so many tokens that were found it is seen for itself, since the more are found,
    the likelier they go on as before; and for rounds that begin before it is known what is found.
    What trying may cost is half of what exits may.
    """

    STAKE, SHARE, BOUND = Pace.STAKE / 2, Pace.SHARE / 2, Pace.BOUND / 2
    RESTS = 0  # what a text has for the next token is another thing each time

    def __init__(self, longest: int) -> None:
        """longest: drafts at most."""
        super().__init__(longest, COST, stops=False)
        self._lookup = Lookup()
        self.size = 0  # how many tokens it is about drafts behind
        self._seen = [[[0.0] * longest for _ in range(4)] for _ in HOPES]

    def drafts(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`; from now on it is about such drafts."""
        size, place = self._lookup.find(ids)
        self.regard(size)
        return list(ids[place : place + max(0, min(most, self.longest))]) if size else []

    def regard(self, size: int) -> None:
        """From now on it is about drafts behind so many tokens; 0: it is not known of how many."""
        self._forget()
        self.size, self.hope = size, HOPES[size]
        self._tried, self._kept, self._asked, self._limited = self._seen[size]

    def outlook_behind(self, size: int, room: int) -> float:
        """The tokens of a round with as many drafts as may be, behind so many that are found."""
        self.regard(size)
        return self.outlook(room)[-1][0]
