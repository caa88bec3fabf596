"""How many drafts a round may have, by exits or by the text itself, and what is learned of that."""

from __future__ import annotations

from collections.abc import Sequence

from ee_tuning.decode.lookup import COST, MATCH, Limits, TextDrafts
from ee_tuning.decode.pace import Clock, Pace, plan, promised
from ee_tuning.decode.rounds import Round
from ee_tuning.decode.sequences import Row, Sequences


def limit(sequences: Sequences, rows: Sequence[Row], may: bool = True) -> Clock | None:
    """Say how many drafts the next round of `rows` may have; gives the clock of such rounds.

    may: whether those may have any that do not always draft.
    """
    for row in rows:
        if row.policy.steady:
            row.limit = row.within(row.policy.max_pending)
    free = [(row, row.pace) for row in rows if row.pace is not None]
    if not free:
        return None
    paces, rooms = [pace for _, pace in free], [row.left for row, _ in free]
    clock = sequences.clock(len(rows), max(pace.cost for pace in paces))
    number = plan(paces, rooms, clock) if may else 0
    for row, _ in free:
        row.limit = row.within(number) if number else 0  # of many texts most only rest
    return clock


def look_up(sequences: Sequences, rows: Sequence[Row], exits: Clock | None) -> Clock | None:
    """Let `rows` go on with the drafts that their texts have, if these promise more tokens a second
    than the exits' drafts; gives the clock of such rounds. None do beside rows that always draft.

    exits: the clock of rounds in which these draft.
    """
    texts = [(row, row.text) for row in rows if row.text is not None]
    if not texts or any(row.policy.steady for row in rows):
        return None
    clock, paces = sequences.clock(len(rows), COST), [text for _, text in texts]
    found = [text.drafts(row.ids, row.left - 1) for row, text in texts]
    if not any(found):
        return clock
    rooms = [row.left if drafts else 1 for (row, _), drafts in zip(texts, found, strict=True)]
    looks = clock.looks()
    most = 0 if looks else plan(paces, rooms, clock)
    found = [drafts[:most] for drafts in found]
    own = promised(paces, [len(drafts) for drafts in found], clock, len(rows) - len(texts))
    asked = [(row, row.pace) for row in rows if row.pace is not None]
    theirs = float(len(rows))
    if exits is not None:
        limits = [row.limit for row, _ in asked]
        theirs = promised([pace for _, pace in asked], limits, exits, len(rows) - len(asked))
    if looks or (any(found) and own > theirs):
        for row, _ in asked:
            row.limit = 0
        for (row, _), drafts in zip(texts, found, strict=True):
            row.look_up(drafts)
    return clock


def by_text(
    row: Row, text: TextDrafts, underway: bool, clocks: Sequence[Clock]
) -> tuple[Limits, Limits]:
    """How many drafts the next round of a row may have that its text alone drafts for, and the one
    behind it. Of the next one it is known what the text has for it.

    clocks: of the rounds begun so, and of those begun behind another.
    """
    now = behind = 0
    # Where nothing promises, as little as may be: the device waits.
    if not underway and text.drafts(row.ids, row.left - 1) and not clocks[1].looks():
        now = plan([text], [row.left], clocks[0])
    if now or underway:
        text.regard(0)
        behind = plan([text], [row.left], clocks[1])
    return Limits(0, (0, *[now] * MATCH)), Limits(0, (0, *[behind] * MATCH))


def beside_text(row: Row, text: TextDrafts, underway: bool, clock: Clock) -> tuple[Limits, Limits]:
    """The same of a row for which a draft exit drafts, too, up to `row.limit`."""
    pace, limits = row.pace, Limits(row.limit)
    # Where the text has drafts, the exit has made one for nothing.
    cost = clock.rounds(1)
    if pace is not None and not clock.looks() and pace.margin(row.left, clock) >= cost - 1:
        theirs = promised([pace], [row.limit], clock) * cost
        pays = [text.outlook_behind(size, row.left) > theirs for size in range(1, MATCH + 1)]
        limits = Limits(row.limit, (0, *(text.longest * one for one in pays)))
    limits = limits.within(row.left - 1)
    if row.limit:
        return limits, limits
    found = [] if underway else text.drafts(row.ids, row.left - 1)
    return limits if found and limits.texts[text.size] else Limits(), Limits()


def learn(row: Row, one: Round, kept: int) -> Pace | None:
    """Take in what a round of a row that is alone has brought; gives the pace that it is about."""
    text, pace, made = row.text, row.pace, len(one.drafts)
    looked = one.limits.texts[one.size] > 0
    if pace is None:
        if text is not None and one.known:
            text.regard(one.size)
            text.learn(made, made, kept)
        elif text is not None:
            if looked:
                text.regard(one.size)
                text.see(made, made, kept)
            text.regard(0)
            text.learn(one.limits.most, made, kept)
        return text
    if text is not None and looked:  # the exit's first draft was for nothing
        text.regard(one.size)
        text.learn(made, made, kept)
        pace.spend(kept + 1, 1)
    else:
        pace.learn(one.limits.exit, made, kept)
    return pace
