"""Tests of a risk and intervals: against slow references, and by simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ee_tuning.calibrate.bounds import (
    TESTS,
    betting_p,
    binomial_p,
    check_levels,
    check_losses,
    hoeffding_bentkus_p,
    interval,
    least_prompts,
    running_bound,
)
from ee_tuning.calibrate.risks import Measured
from ee_tuning.calibrate.walk import answer, split, walk
from ee_tuning.errors import UserError

EPSILON, DELTA = 0.05, 0.05
SETS = 1000
SLACK = 3 * math.sqrt(DELTA * (1 - DELTA) / SETS)  # of a share that is counted over so many


def slow_binomial(n, errors, epsilon):
    """In fractions."""
    e = Fraction(epsilon)
    return float(sum(math.comb(n, k) * e**k * (1 - e) ** (n - k) for k in range(errors + 1)))


def slow_betting(losses, epsilon, delta):
    """Word by word as it is defined."""
    n, capital, best = len(losses), 1.0, 1.0
    means = [0.5]
    for t in range(1, n + 1):
        before = losses[: t - 1]
        variance = (0.25 + sum((x - m) ** 2 for x, m in zip(before, means[1:], strict=True))) / t
        bet = min(1.0, math.sqrt(2 * math.log(1 / delta) / (n * variance)))
        capital *= 1 - bet * (losses[t - 1] - epsilon)
        best = max(best, capital)
        means.append((0.5 + sum(losses[:t])) / (t + 1))
    return min(1.0, 1 / best)


def slow_hoeffding_bentkus(losses, epsilon):
    n, mean = len(losses), sum(losses) / len(losses)
    a = min(mean, epsilon)
    first = 0.0 if a == 0 else a * math.log(a / epsilon)
    hoeffding = math.exp(-n * (first + (1 - a) * math.log((1 - a) / (1 - epsilon))))
    bentkus = math.e * slow_binomial(n, math.ceil(round(sum(losses), 9)), epsilon)
    return min(1.0, hoeffding, bentkus)


@pytest.mark.parametrize("seed", range(12))
def test_p_values_are_those_of_slow_references(seed):
    random = np.random.default_rng(seed)
    n, epsilon = int(random.integers(5, 60)), float(random.uniform(0.02, 0.4))
    delta = float(random.uniform(0.01, 0.2))
    shares = random.beta(0.3, 5, n)
    binary = (random.random(n) < epsilon / 2).astype(float)
    for losses in (shares, binary, np.zeros(n), np.ones(n)):
        assert betting_p(losses, epsilon, delta) == pytest.approx(
            slow_betting(losses.tolist(), epsilon, delta), rel=1e-9
        )
        assert hoeffding_bentkus_p(losses, epsilon) == pytest.approx(
            slow_hoeffding_bentkus(losses.tolist(), epsilon), rel=1e-9
        )
    errors = int(binary.sum())
    assert binomial_p(binary, epsilon) == pytest.approx(slow_binomial(n, errors, epsilon))
    # What counts as 1 is at least what it was, so this errs on the side of caution.
    assert binomial_p(shares, epsilon) == pytest.approx(slow_binomial(n, n, epsilon))


def test_how_many_prompts_it_takes():
    assert least_prompts(0.01, 0.05, binomial_p) == 299
    for epsilon, delta in ((0.01, 0.05), (0.1, 0.1), (0.5, 0.5), (0.003, 0.2)):
        for test in TESTS.values():
            least = least_prompts(epsilon, delta, test)
            assert test(np.zeros(least), epsilon, delta) <= delta
            assert least == 1 or test(np.zeros(least - 1), epsilon, delta) > delta


# Risks of candidates from careful to bold, the limit among them; none may be passed from there on.
RISKS = np.array([0.2, 0.6, 1.0, 1.3, 2.0]) * EPSILON


def shares_of_tokens(random, n, spread):
    """Losses (n, C): of 64 tokens of a text, how many are wrong; texts are of all kinds.

    spread: how different they are; the larger, the more alike are tokens of one text.
    """
    mean = RISKS[-1]
    kind = random.beta(mean / spread, (1 - mean) / spread, n)
    wrong = random.binomial(64, kind) / 64
    return wrong[:, None] * (RISKS / mean)


def right_or_wrong(random, n, spread):
    return (random.random(n)[:, None] < RISKS).astype(float)


class Given:
    """A risk whose losses are there."""

    def __init__(self, losses):
        self.losses = losses

    def measure(self, thresholds, prompts):
        return Measured(self.losses[prompts, thresholds[1]], 1.0)


@pytest.mark.parametrize(
    ("draw", "test", "spread"),
    [
        (right_or_wrong, "binomial", 0),
        (right_or_wrong, "betting", 0),
        (shares_of_tokens, "betting", 0.02),
        (shares_of_tokens, "betting", 0.5),
        (shares_of_tokens, "hoeffding-bentkus", 0.5),
    ],
)
def test_false_certificates_are_as_rare_as_said(draw, test, spread):
    random, false, found = np.random.default_rng(1), 0, 0
    candidates = [{1: number} for number in range(len(RISKS))]
    for seed in range(SETS):
        risk = Given(draw(random, 500, spread))
        parts = split(500, seed)
        step = answer(walk(candidates, risk, parts.test, EPSILON, DELTA, test), DELTA)
        if step is not None:
            found += 1
            false += RISKS[step.thresholds[1]] >= EPSILON
    assert false / SETS <= DELTA + SLACK
    assert found > 0  # the walk begins


def test_tokens_taken_for_units_would_certify_far_too_often():
    """Why losses are one per prompt: at the limit, the exact test of tokens passes much more often
    than delta, that of prompts does not."""
    random, tokens, prompts = np.random.default_rng(2), 0, 0
    for _ in range(SETS):
        kind = random.beta(EPSILON / 0.05, (1 - EPSILON) / 0.05, 200)
        wrong = random.binomial(64, kind)
        tokens += slow_binomial_of(wrong.sum(), 64 * 200) <= DELTA
        prompts += betting_p(wrong / 64, EPSILON, DELTA) <= DELTA
    assert prompts / SETS <= DELTA + SLACK
    assert tokens / SETS > 3 * DELTA


def slow_binomial_of(errors, n):
    losses = np.zeros(n)
    losses[:errors] = 1
    return binomial_p(losses, EPSILON)


@pytest.mark.parametrize("losses", [np.zeros((3, 4)), [[0.0], [0.1, 0.2]], [], None])
def test_losses_of_tokens_are_refused(losses):
    with pytest.raises(UserError, match="one loss per prompt"):
        check_losses(losses)


@pytest.mark.parametrize("losses", [[0.0, 1.2], [-0.1], [math.nan]])
def test_losses_outside_of_their_bounds_are_refused(losses):
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        check_losses(losses)


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 0.1), (1, 0.1), (-1, 0.1), (0.1, 0), (0.1, 2)])
def test_levels_outside_of_their_bounds_are_refused(epsilon, delta):
    with pytest.raises(UserError, match="not between 0 and 1"):
        check_levels(epsilon, delta)


def test_power():
    """A fifth of the allowed risk is nearly always proven with 400 prompts, by betting more often
    than by the bound beside it."""
    random, passed = np.random.default_rng(3), {"betting": 0, "hoeffding-bentkus": 0}
    for _ in range(200):
        losses = random.beta(0.5, 24.5, 400) * 0.7  # mean 1.4%
        for name in passed:
            passed[name] += TESTS[name](losses, EPSILON, DELTA) <= DELTA
    assert passed["betting"] >= 0.98 * 200
    assert passed["betting"] >= passed["hoeffding-bentkus"]


@pytest.mark.parametrize("n", [400, 1600])
def test_how_far_below_the_limit_a_mean_has_to_be(n):
    """As the docs say, where losses hardly differ."""
    need = math.log(1 / DELTA) / n
    for share, passes in ((0.9, False), (1.15, True)):
        assert (betting_p(np.full(n, EPSILON - share * need), EPSILON, DELTA) <= DELTA) == passes


@pytest.mark.parametrize("binary", [True, False])
def test_intervals_hold(binary):
    random, missed, mean = np.random.default_rng(4), 0, 0.1
    for _ in range(300):
        losses = random.beta(1, 9, 80)
        if binary:
            losses = (random.random(80) < mean).astype(float)
        low, high = interval(losses, 0.1)
        assert 0 <= low <= losses.mean() <= high <= 1
        assert high - low < 0.5
        missed += not low <= mean <= high
    assert missed / 300 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 300)


def slow_running_bound(losses, delta):
    """On a grid of risks: the largest that bets begun at one loss or another have won against."""
    best = 0.0
    for risk in np.linspace(0.005, 0.995, 199):
        own, capitals = [], []
        for t, loss in enumerate(losses, start=1):
            capitals += [(2.0**-k, 1 / (7 * t * (t + 1))) for k in range(1, 8)]
            capitals = [(bet, one * (1 + bet * (loss / risk - 1))) for bet, one in capitals]
            own.append(sum(one for _, one in capitals))
        if max(own) >= 1 / delta:
            best = risk
    return best


def test_the_running_bound_is_that_of_a_slow_reference():
    losses = np.concatenate([np.full(20, 0.05), np.random.default_rng(6).beta(2, 3, 20)])
    slow = slow_running_bound(losses.tolist(), 0.05)
    assert slow <= running_bound(losses, 0.05) < slow + 0.006
    assert slow > 0.15
    assert running_bound(np.zeros(0), 0.05) == running_bound(np.zeros(50), 0.05) == 0


def test_a_running_bound_holds_at_all_times():
    random, missed = np.random.default_rng(5), 0
    for _ in range(60):
        losses = (random.random(160) < 0.1).astype(float)
        missed += any(running_bound(losses[:n], 0.1) > 0.1 for n in range(10, 161, 30))
    assert missed / 60 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 60)


def test_a_running_bound_sees_a_change_after_a_long_time_without():
    random = np.random.default_rng(7)
    before, after = (random.random(2000) < 0.02), (random.random(200) < 0.3)
    assert running_bound(before.astype(float), 0.05) < 0.05
    assert running_bound(np.concatenate([before, after]).astype(float), 0.05) > 0.1


def test_splits_have_each_prompt_once():
    parts = split(1000, 0)
    assert [len(part) for part in (parts.order, parts.test, parts.report)] == [400, 400, 200]
    every = np.concatenate([parts.order, parts.test, parts.report])
    assert sorted(every) == list(range(1000))
    assert not np.array_equal(parts.test, split(1000, 1).test)
    assert np.array_equal(parts.test, split(1000, 0).test)
    ordered = split(1000, 0, ordered=True)
    assert [len(part) for part in (ordered.order, ordered.test, ordered.report)] == [0, 800, 200]


def test_a_walk_ends_at_the_first_that_fails():
    losses = np.zeros((200, 4))
    losses[:, 2] = 0.5  # fails, so that the last, which would pass, is not tried
    steps = walk([{1: n} for n in range(4)], Given(losses), np.arange(200), 0.1, 0.05, "betting")
    assert [step.p <= 0.05 for step in steps] == [True, True, False]
    assert answer(steps, 0.05).thresholds == {1: 1}
    losses[:, 0] = 0.5
    steps = walk([{1: n} for n in range(4)], Given(losses), np.arange(200), 0.1, 0.05, "betting")
    assert len(steps) == 1
    assert answer(steps, 0.05) is None
