"""How many drafts a round has: as many as bring the most tokens a second, and little is lost."""

import random

import pytest

from ee_tuning.decode.pace import Clock, Pace, plan

LONGEST, NEW, COST = 6, 128, 0.1


def play(chances, times, noise, seed, fixed=None, texts=5):
    """Seconds of texts in one engine; how many drafts a round has is `fixed`, or found.

    chances: for a random generator, of each draft at each place. times: z, V and d, which clocks
    see with `noise`, and with a pause now and then.
    """
    plain, base, slope = times
    draw, noises, clock, found = random.Random(seed), random.Random(seed), Clock(COST), []
    for _ in range(texts):
        own, pace, at, total = chances(draw), Pace(LONGEST, COST, stops=False), 0, 0.0
        while at < NEW:
            number = plan([pace], [NEW - at], clock) if fixed is None else fixed
            number, kept = min(number, NEW - at - 1), 0
            while kept < number and draw.random() < own[at][kept]:
                kept += 1
            seconds = base + slope * number if number else plain
            if fixed is None:
                pace.learn(number, number, kept)
                pause = 4 if noises.random() < 0.02 else 1
                clock.learn(number, seconds * noises.lognormvariate(0, noise) * pause)
            total, at = total + seconds, at + kept + 1
        found.append(total)
    return found


def alike(*chances):
    return lambda draw: [chances] * NEW


def turning(draw):
    """A text that is easy and hard by turns."""
    easy, own = draw.random() < 0.5, []
    for _ in range(NEW):
        easy ^= draw.random() < 0.05
        own.append((0.9 if easy else 0.1,) * LONGEST)
    return own


TEXTS = {
    "nothing is kept": alike(*[0.03] * 6),
    "half is kept": alike(*[0.5] * 6),
    "surer later": alike(0.69, 0.71, 0.75, 0.78, 0.8, 0.83),
    "nearly all is kept": alike(*[0.9] * 6),
    "by turns": turning,
}


@pytest.fixture(scope="module")
def played():
    """Seconds of 15 texts each: as found, of the best number of drafts, of the slowest text."""
    found, seeds = {}, range(3)
    for name, chances in TEXTS.items():
        for *times, noise in ((1, 1.11, 0.055, 0.02), (1, 1.05, 0.02, 0.15), (1, 1.3, 0.3, 0.02)):

            def seconds(fixed=None, case=(chances, times, noise)):
                return [one for seed in seeds for one in play(*case, seed, fixed)]

            own, best = seconds(), min(sum(seconds(fixed)) for fixed in range(LONGEST + 1))
            found[name, noise, times[2]] = sum(own), best, max(own)
    return found


def test_rounds_bring_about_what_the_best_number_of_drafts_would(played):
    """Which is another one for each kind of text and of device, and not known before."""
    shares = {case: own / best for case, (own, best, _) in played.items()}
    assert sum(shares.values()) / len(shares) < 1.05
    assert max(shares.values()) < 1.15, shares


def test_no_text_is_much_slower_than_without_drafts(played):
    """The clocks' noise allows for a part of what is lost."""
    for (_, noise, _), (*_, slowest) in played.items():
        assert slowest < NEW * (1.035 if noise < 0.1 else 1.06)


def test_a_pause_in_the_first_round_with_drafts_is_no_reason_to_stop():
    clock, pace = Clock(COST), Pace(LONGEST, COST, stops=False)
    for _ in range(Clock.LEAST):
        assert plan([pace], [NEW], clock) == 0
        pace.learn(0, 0, 0)
        clock.learn(0, 1.0)
    number = plan([pace], [NEW], clock)
    pace.learn(number, number, number)
    clock.learn(number, 50.0)
    assert plan([pace], [NEW], clock) > 0


def test_drafts_are_no_more_than_asked_for_and_what_the_text_needs():
    pace, clock = Pace(8, COST), Clock(COST)
    clock.LEAST = 0
    for _ in range(20):
        pace.learn(8, 8, 8)
    assert plan([pace], [100], clock) == 8
    assert plan([pace], [3], clock) == 2
    assert plan([pace], [1], clock) == 0
    assert plan([Pace(0, COST)], [9], clock) == 0
    # Together, one that needs many and one that needs none.
    assert plan([pace, Pace(8, COST)], [100, 1], clock) > 0


def test_a_clock_that_is_told_nothing_is_not_waited_for():
    """Rounds are not timed while others are part of them."""
    clock, pace = Clock(COST), Pace(LONGEST, COST)
    numbers = [plan([pace], [NEW], clock) for _ in range(3 * Clock.LEAST)]
    assert numbers[-1] > 0 == numbers[0]


def test_a_clock_may_see_a_round_without_drafts_late():
    """As many as it learns of one by one had drafts, the others were not timed."""
    clock = Clock(COST)
    for _ in range(2 * Clock.LATELY + 1):
        clock.learn(3, 2.0)
    for _ in range(3):
        clock.learn(0, 1.0)
        assert clock.rounds(3) == pytest.approx(2.0)


def test_a_clock_of_ranks_says_the_same_on_each():
    clock, pace = Clock(COST, timed=False), Pace(LONGEST, COST)
    for _ in range(9):
        clock.learn(0, 1.0)
        clock.learn(6, 9.0)
    assert plan([pace], [NEW], clock) == LONGEST
    assert clock.rounds(LONGEST) == pytest.approx(1 + COST * LONGEST)


def test_chains_that_end_early_cost_what_they_have():
    """An exit that is never sure is asked once a round, which is all that it costs."""
    short, long = Pace(LONGEST, 0.3), Pace(LONGEST, 0.3, stops=False)
    for pace in (short, long):
        for _ in range(30):
            pace.learn(LONGEST, 1, 1)
    assert short.outlook(NEW)[-1][1] == pytest.approx(2, abs=0.2)
    assert long.outlook(NEW)[-1][1] == pytest.approx(LONGEST, abs=0.2)


def test_looks_are_rarer_the_more_drafts_bring():
    def until_look(kept):
        clock, pace, count = Clock(0.02), Pace(LONGEST, 0.02, stops=False), 0
        for _ in range(Clock.LEAST):
            plan([pace], [NEW], clock)
            clock.learn(0, 1.0)
        while number := plan([pace], [NEW], clock):
            pace.learn(number, number, min(kept, number))
            clock.learn(number, 1 + 0.02 * number)
            count += 1
        return count

    assert Clock.RARELY < until_look(1) < until_look(6) < 200


@pytest.mark.parametrize("took", [1.2, 1.5, 1.9])
def test_what_trying_took_is_bounded_whatever_the_clock_says(took):
    """Which thinks that rounds with drafts are cheap. The last try may go beyond it."""
    clock, pace, late = Clock(0.01, timed=False), Pace(LONGEST, 0.01, stops=False), 0.0
    for at in range(NEW):
        number = plan([pace], [NEW - at], clock)
        pace.learn(number, number, 0)
        pace.took(took if number else 1.0)
        late += took - 1 if number else 0.0
    assert took - 1 <= late <= Pace.BOUND * NEW + took - 1


def test_a_pause_counts_as_little_as_for_the_clock():
    clock = Clock(0.1)
    assert clock.share(2, 7.0) == pytest.approx(1.2)  # nothing is known yet
    clock.learn(0, 1.0)
    assert clock.share(2, 1.3) == pytest.approx(1.3)
    assert clock.share(2, 50.0) == pytest.approx(Clock.SLOW * clock.rounds(2))


def test_rounds_without_drafts_count_together_as_one_by_one():
    paces, clock = [Pace(LONGEST, COST) for _ in range(2)], Clock(COST)
    for pace in paces:
        pace.learn(6, 4, 2)
    paces[0].rest(4)
    for _ in range(4):
        paces[1].learn(0, 0, 0)
    assert paces[0].margin(NEW, clock) == pytest.approx(paces[1].margin(NEW, clock))
    for one, other in zip(*(pace.outlook(NEW) for pace in paces), strict=True):
        assert one == pytest.approx(other)


def test_a_draft_takes_time_whatever_a_few_rounds_took():
    """Those with fewer drafts of a size than most are the last of texts, and may be slow ones."""
    clock = Clock(0.1, most=[3, 6])
    for _ in range(10):
        clock.learn(0, 1.0)
        clock.learn(3, 1.8)
        clock.learn(6, 2.2)
    for _ in range(5):
        clock.learn(4, 3.0)
    took = [clock.rounds(drafts) for drafts in range(1, 7)]
    assert took == sorted({*took})


@pytest.mark.parametrize(("drafts", "rounds"), [(6, Clock.STALE), (0, Clock.STALE / Clock.RESTS)])
def test_what_a_slow_time_says_of_a_pass_is_not_believed_for_ever(drafts, rounds):
    """Rounds of up to three drafts were slow while there were some; others were chosen since."""
    clock = Clock(COST, most=[3, 6])
    for _ in range(Clock.LATELY):
        clock.learn(0, 1.0)
        clock.learn(3, 1.9)
    for _ in range(int(rounds) - Clock.LATELY):
        clock.learn(drafts, 1.6 if drafts else 1.0)
    assert clock.rounds(3) == pytest.approx(1.9)
    for _ in range(2 * Clock.LATELY):
        clock.learn(drafts, 1.6 if drafts else 1.0)
    assert clock.rounds(3) < 1.4
    clock.learn(3, 1.3)
    clock.learn(3, 1.3)
    assert clock.rounds(3) == pytest.approx(1.3)


def test_a_look_that_is_not_counted_is_not_waited_for():
    """As of texts beside which others draft in another way."""
    clock = Clock(COST)
    for _ in range(Clock.LEAST):
        clock.learn(0, 1.0)
    looks = []
    for _ in range(400):
        looks.append(clock.looks())
        if not looks[-1]:
            clock.learn(2, 1.3)
    assert 0 < sum(looks) < 60
    clock.learn(0, 1.0)  # it was
    assert not clock.looks()
