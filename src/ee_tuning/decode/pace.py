"""How many drafts a round has: those that bring the most tokens a second, none among the choices.

A round of k drafts gives 1 + Σⱼ P(the first j are kept) tokens, j ≤ k (as arXiv 2211.17192, section
3.4, with a probability for each place), and takes V + d · k seconds, where a round without drafts
takes z. The probabilities are a sequence's own (`Pace`), the seconds those of all rounds of an
engine with as many sequences (`Clock`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from statistics import median

# Of texts side by side: how often what a round may lose counts of what one of them is ahead, and
# which part of `Pace.BOUND` where it is late.
SHARED, BOUNDED = 2.0, 2 / 3
MANY = 4  # a part of them is the number of rounds in which none is asked again, once all rest


class Clock:
    """How long rounds took lately, in rounds without drafts: on a line, V / z + k · d / z, with a V
    for each size of pass that verifies. Of one that was not seen yet much is hoped, so it is tried.
    """

    LATELY = 48  # rounds that count, with drafts and without
    LEAST = 3  # rounds without drafts before there are any with
    RARELY = 6  # rounds with drafts between two looks at one without, at least
    SHARE = 0.005  # of what drafts bring, what is given up for these
    FIRM = 4.0  # what the slope that is assumed weighs, in squared drafts
    SLOW = 2.0  # a round counts as no longer than so often what was expected
    AFRESH = 4  # rounds from one look at all of these to the next
    # A round with drafts is forgotten after so many of these, since it may have been a slow time:
    # what then nothing is known of is tried again. To leave rounds without takes more, so these
    # count less.
    STALE, RESTS = 192.0, 1 / 8

    def __init__(self, cost: float, timed: bool = True, most: Sequence[int] = ()) -> None:
        """cost: of a draft, as a share of a round without any, before much was seen. timed: False,
        where nothing may depend on what rounds take. most: drafts of each size of pass, ascending,
        where there are several."""
        self.cost, self.timed, self._most = cost, timed, [*most[:-1]]
        self._plain: deque[float] = deque(maxlen=self.LATELY)
        sizes = range(len(self._most) + 1)
        # When, by the rounds before; how many drafts; and seconds.
        self._drafted = [deque[tuple[float, float, float]](maxlen=self.LATELY) for _ in sizes]
        self._now = 0.0
        self._usual = 0.0  # z
        self._bases, self._slope = [1.0 for _ in sizes], cost
        self._looks = self._known = self._drafting = 0
        self._until, self._together = self.RARELY, 1

    def learn(self, drafts: float, seconds: float, rounds: int = 1) -> None:
        """Take in a round that had to make so many drafts, or so many without any, by seconds of
        each, that the host looked at together."""
        if not self.timed:
            return
        if self._usual:
            seconds = min(seconds, self.SLOW * self.rounds(drafts) * self._usual)
        if drafts:
            self._drafted[self._size(drafts)].append((self._now, drafts, seconds))
            self._drafting += 1
        else:
            self._plain.append(seconds)
            self._together = rounds
            self._looks = self._drafting = 0
        self._now += 1 if drafts else rounds * self.RESTS
        for seen in self._drafted:
            while seen and seen[0][0] <= self._now - self.STALE:
                seen.popleft()
        self._known += 1
        # At first after each round: what a look at all of them takes is not for nothing.
        often = self._known < self.LATELY or not self._usual
        if self._plain and (often or self._known % self.AFRESH == 0):
            self._usual = median(self._plain)
            self._fit()

    def looks(self) -> bool:
        """Whether the next round is to be one without drafts, to see what that takes."""
        due = self._drafting >= self._until
        if not self.timed or (len(self._plain) >= self.LEAST and not due):
            return False
        # Not for ever: rounds that compile, or with other rows in them, are not timed.
        if self._looks < 2 * self.LEAST:
            self._looks += 1
            return True
        if due:  # later again
            self._looks, self._drafting = 0, -self.LATELY
        return False

    def promise(self, rate: float) -> None:
        """Take in what drafts promise, in tokens for each that there would be without any.

        The less they do, the more depends on knowing it well, and the less a look gives up.
        """
        lost = self._together * (1 - 1 / rate)
        self._until = max(self.RARELY, int(lost / self.SHARE))

    def rounds(self, drafts: float) -> float:
        """What a round with so many drafts takes."""
        if not drafts:
            return 1.0
        base = self._bases[self._size(drafts)]
        # No less than half of what its weights say: a few rounds without may have been slow ones.
        return max(base + self._slope * drafts, 1 + self.cost * drafts / 2)

    def share(self, drafts: float, seconds: float) -> float:
        """What a round with so many drafts took, in rounds without any; a pause counts as little
        as it does in `learn`."""
        expected = self.rounds(drafts)
        return min(seconds / self._usual, self.SLOW * expected) if self._usual else expected

    def _size(self, drafts: float) -> int:
        """Of the pass that verifies so many."""
        return bisect_left(self._most, drafts)

    def _fit(self) -> None:
        """Find V / z of each size, and d / z; what is assumed counts as a round, too."""
        every = [[(k, took / self._usual) for _, k, took in some] for some in self._drafted]
        square, product = self.FIRM, self.FIRM * self.cost
        for seen in filter(None, every):
            x, y = (sum(values) / len(seen) for values in zip(*seen, strict=True))
            square += sum((drafts - x) ** 2 for drafts, _ in seen)
            product += sum((drafts - x) * (took - y) for drafts, took in seen)
        # No less, either: rounds with few drafts are often the last of a text, and slow ones.
        slope = self._slope = max(product / square, self.cost / 2)
        self._bases = [median([1.0, *(took - slope * k for k, took in seen)]) for seen in every]


class Pace:
    """What drafts have brought a sequence.

    A draft's chance is that of being made and kept where the one before it was. What was seen is
    forgotten bit by bit, so a chance that was found to be small grows towards `HOPE`, and drafts
    are tried again. What trying may cost is bounded: see `margin`.
    """

    FORGETS = 0.975  # of what was seen, the share that is still counted a round later
    HOPE, FIRST = 0.8, 4.0  # the chance of a first draft, as if it was that of so many tried
    LATER = 2.0  # the same at a later place, of whose chance the place before it gives an idea
    STAKE, SHARE, BOUND = 1.8, 0.01, 0.024  # see `margin`
    RESTS = 3  # rounds in which it rests without being asked, beside others, once it does, at least

    def __init__(self, longest: int, cost: float, stops: bool = True) -> None:
        """longest: drafts at most. cost: of a draft, as a share of a pass at full depth. stops: a
        round whose drafts end early takes less time."""
        self.longest, self.cost, self.stops = longest, cost, stops
        self.hope = self.HOPE
        self.asked = 0  # drafts that the last round had to make, one in vain included
        self.rests = 0  # of these, those to come
        self._ahead, self._tokens, self._rested = 0.0, 0, 0
        self._unpaid: list[int] = []
        self._tried, self._kept, self._asked = ([0.0] * longest for _ in range(3))
        self._limited = [0.0] * longest

    def learn(self, limit: int, drafted: int, kept: int) -> None:
        """Take in that of up to `limit` drafts so many were made, and the first `kept` right."""
        asked = min(drafted + 1, limit) if self.stops else limit
        self.see(limit, asked, kept)
        self.spend(kept + 1, asked)

    def see(self, limit: int, asked: int, kept: int) -> None:
        """Take in what became of up to `limit` drafts, of which so many had to be made."""
        self._forget()
        told = (self._tried, kept + 1), (self._kept, kept), (self._asked, asked)
        for seen, number in (*told, (self._limited, limit)):
            most = min(number, limit)
            seen[:] = [self.FORGETS * x + (place < most) for place, x in enumerate(seen)]

    def spend(self, tokens: int, asked: int) -> None:
        """Take in that a round has given so many tokens, and had to make so many drafts."""
        self.asked = asked
        self._tokens += tokens
        self._ahead += tokens
        self._unpaid.append(asked)

    def rest(self, rounds: int) -> None:
        """Take in so many rounds without drafts, as `learn` one by one."""
        self.asked = 0
        self._tokens += rounds
        self._rested += rounds

    def _forget(self) -> None:
        """Of what was seen before the last rounds without drafts, what these let it forget: at once
        when it is needed, since of many texts most only rest."""
        if self._rested:
            share, self._rested = self.FORGETS**self._rested, 0
            for seen in (self._tried, self._kept, self._asked, self._limited):
                seen[:] = [share * value for value in seen]

    def took(self, rounds: float) -> None:
        """Take in what the last round really took, in rounds without drafts."""
        del self._unpaid[-1:]
        self._ahead -= rounds

    def margin(self, room: int, clock: Clock, share: float = 1.0) -> float:
        """What may be lost now, in rounds without drafts, if `room` more tokens are wanted.

        It is how much sooner the text has got so far than it would have without drafts, and what it
        may be late: a stake, which grows with its length, and no more than a share of all of it.
        clock: of the rounds since it was asked for the last time. share: of the bound that counts
        where the text is late.
        """
        self._ahead -= sum(map(clock.rounds, self._unpaid))
        self._unpaid.clear()
        stake = self.STAKE + self.SHARE * self._tokens
        bound = self.BOUND * (share if self._ahead < 0 else 1.0)
        return self._ahead + min(stake, bound * (self._tokens + room))

    def outlook(self, room: int) -> list[tuple[float, float]]:
        """The tokens of rounds of up to 0, 1, … drafts, and how many these have to make.

        room: how many tokens more are wanted: the last needs no draft.
        """
        self._forget()
        tokens, number, right, chance, asked = 1.0, 0.0, 1.0, self.hope, 1.0
        weight, found = self.FIRST, [(1.0, 0.0)]
        for place in range(max(0, min(self.longest, room - 1))):
            chance = (self._kept[place] + weight * chance) / (self._tried[place] + weight)
            asked = (self._asked[place] + asked) / (self._limited[place] + 1)
            right *= chance
            tokens, number, weight = tokens + right, number + asked, self.LATER
            found.append((tokens, number))
        return found


def count(clock: Clock, paces: Sequence[Pace], asked: int, seconds: float) -> None:
    """Take in what a round took in which so many drafts were made; paces: of sequences that it was
    all of a round of."""
    clock.learn(asked, seconds)
    for pace in paces if asked else ():
        pace.took(clock.share(asked, seconds))


def plan(paces: Sequence[Pace], rooms: Sequence[int], clock: Clock) -> int:
    """Drafts at most of the next round that sequences have together.

    rooms: how many tokens more each wants. clock: of rounds with so many of them.
    """
    resting = [pace for pace in paces if pace.rests]
    if 2 * len(resting) > len(paces):  # little has changed since, and asking takes its time
        for pace in resting:
            pace.rests -= 1
        return 0
    alone = len(paces) == 1
    part = 1.0 if alone else BOUNDED
    margins = [pace.margin(room, clock, part) for pace, room in zip(paces, rooms, strict=True)]
    if clock.looks():
        return 0
    outlooks = [pace.outlook(room) for pace, room in zip(paces, rooms, strict=True)]
    found, most = 0, 1.0
    for number, (tokens, asked) in enumerate(outlooks[0] if alone else _together(outlooks)):
        if (rate := tokens / clock.rounds(asked)) > most:
            lost = clock.rounds(number) - 1
            if len(paces) * lost <= sum([min(margin, SHARED * lost) for margin in margins]):
                found, most = number, rate
    clock.promise(most)
    for pace in paces if not (found or alone) else ():
        # Asking takes as long as there are many.
        pace.rests = pace.RESTS and max(pace.RESTS, len(paces) // MANY)
    return found


def _together(outlooks: Sequence[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """As one of them, of a round of all."""
    longest, found = max(map(len, outlooks)), []
    padded = [one + one[-1:] * (longest - len(one)) for one in outlooks]
    for given in zip(*padded, strict=True):
        tokens, asked = zip(*given, strict=True)
        found.append((_harmonic_mean(tokens), max(asked)))
    return found


def promised(paces: Sequence[Pace], numbers: Sequence[int], clock: Clock, idle: int = 0) -> float:
    """Tokens of a round with up to so many drafts of each, in the time of one without any.

    idle: sequences in it that have none.
    """
    found = [pace.outlook(most + 1)[-1] for pace, most in zip(paces, numbers, strict=True)]
    tokens = [1.0] * idle + [tokens for tokens, _ in found]
    took = clock.rounds(max((asked for _, asked in found), default=0))
    return len(tokens) * _harmonic_mean(tokens) / took


def _harmonic_mean(tokens: Sequence[float]) -> float:
    """Of what a round gives sequences: their times have their mean by it, so that what one has at
    once is not what another waits for."""
    # That of `statistics` takes 40 times as long, and a plan asks several times.
    return len(tokens) / sum(1 / number for number in tokens)
