"""The draft round: exits draft, the layers behind them verify, what the end agrees with is kept.

Self-speculation as in LayerSkip (arXiv 2404.16710): a draft's layers up to its exit are computed
once, and verification goes on from their K/V and hidden states. In other modes a round is the same
without verification: what leaves at an exit is settled there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ee_tuning.decode.ahead import Ahead
from ee_tuning.decode.alone import TOKENS, at_once
from ee_tuning.decode.limits import beside_text, by_text, learn, limit, look_up
from ee_tuning.decode.lookup import COST, COST_BEHIND, Limits
from ee_tuning.decode.pace import Clock, count
from ee_tuning.decode.rounds import Rounds
from ee_tuning.decode.sampling import Asked, Choice, Token, choose
from ee_tuning.decode.sequences import Row, Sequences, Settled, Stopwatch
from ee_tuning.decode.straight import Several
from ee_tuning.decode.together import Together
from ee_tuning.exit_config import DRAFT, LOOKUP
from ee_tuning.passes.graphs import Lane
from ee_tuning.passes.wanted import Prediction, Read

# What lets rows go on by so many tokens; gives them, and the seconds that they took the device.
GoOn = Callable[[int], tuple[list[Settled], float]]


def draft_round(sequences: Sequences, rows: Sequence[Row]) -> list[Settled]:
    """Let `rows` go down until some of them have tokens that are settled; these, by row.

    A row for which no token could be chosen has none, but its request's `error`.
    """
    settled: list[Settled] = []
    while not settled:
        door = sequences.next_door(rows)
        layer, standing = sequences.stops[door], [row for row in rows if row.door == door]
        for answers in sequences.advance(door, standing):
            # Draft: at an exit that is sure enough, the token leaves, and the next one begins.
            leaving = [
                (row, found)
                for row, found in answers
                if not row.is_last(door) and row.policy.leaves(layer, found, row.ids)
            ]
            asked = [Asked(row.request.chooser, row.ids, [found]) for row, found in leaving]
            for (row, found), choice in zip(leaving, choose(asked), strict=True):
                if choice.error is not None and row.policy.verifies:
                    continue  # no draft: the end says what follows
                token = Token(choice.token, layer, found.confidence)
                row.leave(token)
                if choice.error is not None or not row.policy.verifies:
                    settled.append(_settled(row, choice, [token]))
            # Verify: what the end says to each of the drafts, and to what follows them.
            ending = [
                (row, [found.earlier(back) for back in range(len(row.drafts), -1, -1)])
                for row, found in answers
                if row.is_last(door)
            ]
            asked = [Asked(row.request.chooser, row.ids, said, row.drafts) for row, said in ending]
            # Keep: the drafts that it agrees with, and its own token after these.
            for (row, said), choice in zip(ending, choose(asked), strict=True):
                settled.append(_learned(row, said, choice))
    return settled


def chain_round(sequences: Sequences, rows: Sequence[Row]) -> list[Settled]:
    """The same with the draft exit: its chains for all `rows`, verified in a pass to the end.

    The host waits for the device once, if passes can choose the texts' tokens.
    """
    settled: list[Settled] = []
    for measure in {row.policy.measure for row in rows}:
        alike = [row for row in rows if row.policy.measure == measure]
        found = _verified_chains(sequences, alike, measure)
        asked = [Asked(row.request.chooser, row.ids, said, row.drafts) for row, said in found]
        for (row, said), choice in zip(found, choose(asked), strict=True):
            settled.append(_learned(row, said, choice))
    return settled


class FirstTokens:
    """The tokens that follow the prompts of new `rows`, which go to the end."""

    def __init__(self, sequences: Sequences, rows: Sequence[Row], lane: Lane | None) -> None:
        """lane: in which the device reads them now, beside what follows; if there is none, or
        logits choose a token, it does so when they are `settled`."""
        self.rows, self._reads, self._sequences = rows, sequences.read(rows), sequences
        self._lane = lane if all(row.request.chooser.in_passes for row in rows) else None
        if self._lane is not None:
            with self._lane.work():
                self._reads = iter([_kept_reads(reads) for reads in self._reads])

    @property
    def over(self) -> bool:
        """Whether it would not help to do something else first."""
        return self._lane is None or self._lane.over

    def settled(self) -> list[Settled]:
        """As `draft_round`, of all of them."""
        settled: list[Settled] = []
        if self._lane is not None:
            self._lane.wait()
        else:  # others have waited for it
            self._sequences.pause()
        for reads in self._reads:
            found = [(row, read.found) for row, read in reads if read.found is not None]
            asked = [Asked(row.request.chooser, row.ids, [said]) for row, said in found]
            for (row, said), choice in zip(found, choose(asked), strict=True):
                row.keep(0, choice.token)
                token = Token(choice.token, row.policy.end, said.confidence)
                settled.append(_settled(row, choice, [token]))
        return settled


def _kept_reads(reads: list[tuple[Row, Read]]) -> list[tuple[Row, Read]]:
    """What a pass has read, good behind the next one, too."""
    for _, read in reads[:1]:  # they share it
        read.keep()
    return reads


def _kept(row: Row, said: Sequence[Prediction], choice: Choice) -> Settled:
    """A row goes on with the drafts that the end agrees with, and its own token after these."""
    drafts, kept = row.drafts, choice.kept
    row.keep(kept, choice.token)
    for draft, one in zip(drafts[:kept], said, strict=False):
        if draft.exit_layer == LOOKUP:
            draft.confidence = one.confidence
    own = Token(choice.token, row.policy.end, said[kept].confidence)
    own.rejected = [draft.id for draft in drafts[kept:]]
    return _settled(row, choice, [*drafts[:kept], own])


def _learned(row: Row, said: Sequence[Prediction], choice: Choice) -> Settled:
    """As `_kept`; the row takes in how many drafts that are."""
    drafts = row.drafts
    settled = _kept(row, said, choice)
    row.learn(drafts, choice.kept)
    return settled


def _verified_chains(
    sequences: Sequences, rows: Sequence[Row], measure: str
) -> list[tuple[Row, list[Prediction]]]:
    """Rows, with their drafts, and what the end says to each of these and to what follows them."""
    passes, starts = sequences.passes, sequences.starts(0)
    chains, count = passes.chains, max(1, *(row.limit for row in rows))
    assert chains is not None
    samples = sequences.samples(rows)
    links = [row.link() for row in rows]
    slots, said = chains.draft(links, starts, count, measure, sequences.drawn(rows))
    chained, found = passes.verify(slots, said, starts, measure, samples)
    verified = []
    for row in rows:
        at = slots.index(row.slot)
        drafted, *chain = chained[at]
        pairs = zip(chain[: int(drafted)], chain[len(chain) // 2 :], strict=False)
        row.draft([Token(int(token), DRAFT, sure) for token, sure in pairs])
        verified.append((row, [found.at(at, place) for place in range(len(row.drafts) + 1)]))
    return verified


def _settled(row: Row, choice: Choice, tokens: list[Token]) -> Settled:
    row.request.error = choice.error
    return row, tokens if choice.error is None else []


def next_round(
    sequences: Sequences,
    rows: Sequence[Row],
    several: Several | None = None,
    ahead: Ahead | None = None,
    together: Together | None = None,
    behind: bool = True,
) -> list[Settled]:
    """`draft_round` and `chain_round` of the rows that are for each.

    several: where rows that draft nothing go on. ahead: where one that is alone does; where there
    is none, the host looks at each token of several, too. together: where several draft, if they
    need not wait for the host. behind: whether something may be `underway` when this is over.
    """
    beginning = [row for row in rows if row.begins and row.policy.verifies]
    if not beginning:
        sequences.pause()
        if (go_on := _at_full_depth(rows, several, ahead, behind)) is not None:
            return go_on(TOKENS)[0]
        if several is not None and several.serves(rows):
            return several.go_on(rows, 1)[0]
        return draft_round(sequences, rows)
    timed = sequences.stopwatch()  # what the host decides is part of a round
    beside = any(one is not None and one.underway(rows) for one in (several, together))
    rounds = ahead.rounds if ahead is not None and ahead.serves(rows) and not beside else None
    if ahead is not None and rounds is not None and rounds.serves(rows[0].policy):
        return _alone(sequences, rows[0], ahead, rounds, timed, behind)
    chained = [row for row in beginning if row.policy.bar is not None]
    layered = [row for row in beginning if row.policy.bar is None]
    # A round with drafts takes longer for texts that have none, too: beside these, others rest.
    may = all(row.policy.verifies for row in rows)
    clocks = [limit(sequences, alike, may) for alike in (chained, layered)]
    sequences.catch_up(chained, any(row.limit for row in chained))
    asked = zip((chained, layered), clocks, strict=True)
    texts = [look_up(sequences, *one) if may else None for one in asked]
    chains = any(row.limit for row in chained)
    rests = not any(row.drafts or row.limit for row in beginning)
    # What the device is at comes before what pays behind it.
    first = not underway(rows, several, ahead)
    drafts = together is not None and first and not rests and together.serves(rows)
    if together is not None and (drafts or together.underway(rows)):
        settled, least = together.go_on(rows, behind and chains)
        if clocks[0] is not None and (seconds := timed()) is not None:
            _count(rows, clocks[0], None, max(seconds, least))
        return settled
    behind = behind and rests and all(row.text is None for row in rows)  # it may have drafts next
    if (rests or not first) and (go_on := _at_full_depth(rows, several, ahead, behind)) is not None:
        # Not what others are part of.
        own = [*clocks, *texts] if rests and len(beginning) == len(rows) else []
        return _rest(sequences, rows, own, go_on, timed, first and behind)
    others = [row for row in rows if row not in chained] if chains else rows
    settled = chain_round(sequences, chained) if chains else []
    if others:
        settled += draft_round(sequences, others)
    seconds = timed()
    for alike, clock, text in zip((chained, layered), clocks, texts, strict=True):
        # Not what others are part of.
        if seconds is not None and len(alike) == len(rows):
            _count(alike, clock, text, seconds)
    return settled


def _count(rows: Sequence[Row], exits: Clock | None, text: Clock | None, seconds: float) -> None:
    """Take in what a round of `rows` took.

    exits, text: the clocks of rounds in which these draft; not of those in which both did.
    """
    paces = [row.pace for row in rows if row.pace is not None]
    texts = [row.text for row in rows if row.text is not None]
    asked, looked = (max((one.asked for one in some), default=0) for some in (paces, texts))
    alone = len(rows) == 1
    if exits is not None and not looked:
        count(exits, paces if alone else [], asked, seconds)
    if text is not None and not asked:
        count(text, texts if alone else [], looked, seconds)


def underway(
    rows: Sequence[Row],
    several: Several | None,
    ahead: Ahead | None,
    together: Together | None = None,
) -> bool:
    """Whether the device is at tokens of some of `rows`, or has found them, of which the host does
    not know yet.

    No prompt may be read then, but apart: what passes write for slots that are idle lies behind
    what the host knows of these.
    """
    if any(one is not None and one.underway(rows) for one in (several, together)):
        return True
    if ahead is None or len(rows) != 1:
        return False
    rounds = ahead.rounds
    return ahead.underway(rows[0]) is not None or (rounds is not None and rounds.underway(rows[0]))


def _at_full_depth(
    rows: Sequence[Row], several: Several | None, ahead: Ahead | None, behind: bool
) -> GoOn | None:
    """What lets rows that have no drafts now go on by so many tokens in one look of the host; None,
    where it is to look at each. behind: see `at_once`."""
    if ahead is None:
        return None
    if several is not None and several.underway(rows):
        return partial(several.go_on, rows, behind=behind)
    if ahead.serves(rows):
        return partial(_ahead, ahead, rows[0], behind=behind)
    # What a text has for a token is not known before the one before it.
    texts = any(row.text is not None for row in rows)
    if texts or several is None or not several.serves(rows):
        return None
    return partial(several.go_on, rows, behind=behind)


def _ahead(ahead: Ahead, row: Row, count: int, behind: bool) -> tuple[list[Settled], float]:
    """The next tokens of a row that is alone. behind: see `_at_full_depth`."""
    tokens, seconds = ahead.go_on(row, at_once(count, behind), behind)
    return [(row, tokens)], seconds


def _rest(
    sequences: Sequences,
    rows: Sequence[Row],
    clocks: Iterable[Clock | None],
    go_on: GoOn,
    timed: Stopwatch,
    first: bool = False,
) -> list[Settled]:
    """Some tokens at full depth, of rows of which drafts do not pay: what each takes, at least on
    the device, is what rounds with drafts are held against.

    clocks: of rounds that have none now, if they are counted. go_on: see `_at_full_depth`. timed:
    of this round. first: the device waits for the host before it, and would not before the next
    ones, so that what it takes is what counts.
    """
    chained = any(row.policy.bar is not None for row in rows)
    # As many as `catch_up` lets the draft exit compute.
    settled, least = go_on(min(TOKENS, sequences.passes.most) if chained else TOKENS)
    for row, tokens in settled:
        for pace in (row.pace, row.text):
            if pace is not None:
                pace.rest(len(tokens))
    seconds, number = timed(), max(1, *(len(tokens) for _, tokens in settled))
    if seconds is not None:
        for clock in filter(None, clocks):
            clock.learn(0, (least if first else max(seconds, least)) / number, number)
    return settled


def _alone(
    sequences: Sequences, row: Row, ahead: Ahead, rounds: Rounds, timed: Stopwatch, behind: bool
) -> list[Settled]:
    """What a row that is alone goes on with: a round, looked at while the device is at the next
    one, or tokens at full depth.

    timed: of this round. behind: see `next_round`.
    """
    text = None if row.policy.steady else row.text
    exits = limit(sequences, [row])
    now = then = Limits(row.limit)
    # Of rounds that are begun when the one before them was read, and of those begun behind it.
    clocks = [] if exits is None else [exits, exits]
    if text is not None and exits is not None:
        now, then = beside_text(row, text, rounds.underway(row), exits)
    elif text is not None:
        clocks = [sequences.clock(1, COST), sequences.clock(1, COST_BEHIND)]
        now, then = by_text(row, text, rounds.underway(row), clocks)
    rests = not now.most and not rounds.underway(row)
    full = rests or ahead.underway(row) is not None
    if row.policy.bar is not None:
        sequences.catch_up([row], not full)
    if full:  # what the device is at comes before what pays behind it
        go_on = partial(_ahead, ahead, row, behind=rests and behind)
        return _rest(sequences, [row], dict.fromkeys(clocks if rests else ()), go_on, timed)
    # A text's first round is looked at before there is another: many are of a few tokens.
    behind = behind and row.linked > len(row.request.ids)
    then = then if behind else Limits()
    one = rounds.go_on(row, now, then, sequences.drawn([row]))
    took = timed()
    row.draft(one.drafts)
    (choice,) = choose([Asked(row.request.chooser, row.ids, one.said, row.drafts)])
    settled = _kept(row, one.said, choice)
    pace = learn(row, one, choice.kept)
    if clocks and pace is not None and took is not None:
        count(clocks[not one.known], [pace], max(pace.asked, 1), max(took, one.seconds))
    return [settled]
