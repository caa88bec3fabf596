"""Tests of a risk, and intervals for it, from losses (n,) within [0, 1], one per prompt.

A p-value is how likely losses like these are, at most, if the risk, their expectation, is epsilon
or more. Prompts are taken to be exchangeable with those to come; the tokens of one text are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import bdtr, betaincinv

from ee_tuning.errors import UserError

Losses = np.ndarray
BETS = 0.5 ** np.arange(1, 8)  # shares of the capital that a loss of 0 costs
STEPS = 30  # of a bisection within [0, 1]


def check_losses(losses: Any) -> Losses:
    """Losses as (n,) float64.

    Raises:
        UserError: they are not one number within [0, 1] per prompt.
    """
    try:
        found = np.asarray(losses, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty((0, 0))
    if found.ndim != 1 or not len(found):
        raise UserError(
            "a risk is tested on one loss per prompt: tokens of a text depend on each other, give "
            "the mean over those of each prompt"
        )
    if not ((found >= 0) & (found <= 1)).all():
        raise UserError("a loss is outside [0, 1]: scale what is bounded, or clip it")
    return found


def check_levels(epsilon: float, delta: float) -> None:
    """Refuse levels that are none.

    Raises:
        UserError: one is not between 0 and 1.
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise UserError(f"{name} {value:g} is not between 0 and 1: give 0.01 or 0.05, say")


def is_binary(losses: Losses) -> bool:
    """Whether all losses are 0 or 1."""
    return bool(((losses == 0) | (losses == 1)).all())


def binomial_p(losses: Losses, epsilon: float, delta: float = 0.0) -> float:
    """Exact, of losses 0 or 1; any above 0 counts as 1."""
    return float(bdtr(int((losses > 0).sum()), len(losses), epsilon))


def betting_p(losses: Losses, epsilon: float, delta: float) -> float:
    """The betting bound of Waudby-Smith and Ramdas (arXiv 2010.09686, section 4).

    With μ_t = (½ + Σ_{i≤t} L_i)/(t+1), v_t = (¼ + Σ_{i≤t} (L_i − μ_i)²)/(t+1) and
    ν_t = min(1, √(2 ln(1/δ)/(n v_{t−1}))) it is min(1, 1/max_t Π_{i≤t} (1 − ν_i (L_i − ε))). The
    product is the capital of somebody who bets on a smaller risk; what it bets before it sees a
    loss. So the losses are to be in an order that does not depend on them.
    """
    variance = _variances(losses)
    bets = np.minimum(1.0, np.sqrt(2 * np.log(1 / delta) / (len(losses) * variance)))
    capital = np.log1p(-bets * (losses - epsilon)).cumsum()
    return float(np.exp(-max(0.0, capital.max())))


def hoeffding_bentkus_p(losses: Losses, epsilon: float, delta: float = 0.0) -> float:
    """The smaller of Hoeffding's and Bentkus' bounds (arXiv 2101.02703, section 3.1)."""
    n, mean = len(losses), min(float(losses.mean()), epsilon)
    divergence = 0.0 if mean == 0 else mean * np.log(mean / epsilon)
    divergence += (1 - mean) * np.log((1 - mean) / (1 - epsilon))
    errors = np.ceil(n * losses.mean() - 1e-9)  # a whole sum may be rounded upwards
    return float(min(1.0, np.exp(-n * divergence), np.e * bdtr(errors, n, epsilon)))


def least_prompts(epsilon: float, delta: float, test: Callable[..., float] = betting_p) -> int:
    """How many prompts without any loss pass `test`."""

    def passes(n: int) -> bool:
        return test(np.zeros(n), epsilon, delta) <= delta

    low, high = 0, 1
    while not passes(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def interval(losses: Losses, delta: float) -> tuple[float, float]:
    """In which the risk is with probability 1 − delta: Clopper and Pearson's of losses 0 or 1, of
    others those risks that betting on smaller and on larger ones does not exclude."""
    n = len(losses)
    if is_binary(losses):
        errors = int(losses.sum())
        low = betaincinv(errors, n - errors + 1, delta / 2) if errors else 0.0
        high = betaincinv(errors + 1, n - errors, 1 - delta / 2) if errors < n else 1.0
        return float(low), float(high)
    bets = np.sqrt(2 * np.log(2 / delta) / (_variances(losses) * n))

    def above(values: Losses) -> float:
        """The same bets on a larger risk are bets on a smaller one of what is not lost."""

        def excluded(risk: float) -> bool:
            # What is lost at most is a bet times 1 − risk: where that is little, bets are larger.
            own = np.minimum(bets, max(1.0, 0.5 / max(1 - risk, 1e-12)))
            return bool(np.log1p(-own * (values - risk)).cumsum().max() >= np.log(2 / delta))

        return _first(excluded)

    return 1 - above(1 - losses), above(losses)


def running_bound(losses: Losses, delta: float) -> float:
    """What the risk is at least, or has come to be: with probability 1 − delta at all times at
    once, however long losses are watched.

    Capital is bet on a larger risk, a part of it on each of `BETS` (arXiv 2010.09686, section 4),
    and of each part a share of 1/(k(k+1)) not before loss k: so what was small for long does not
    hide what grows.
    """
    if not len(losses):
        return 0.0
    times = np.arange(1.0, len(losses) + 1)
    held = np.log(times * (times + 1) * len(BETS))

    def excluded(missing: float) -> bool:
        risk = max(1 - missing, 1e-12)
        gains = np.log1p(BETS[:, None] * (losses / risk - 1)).cumsum(1)
        begun = np.concatenate([np.zeros((len(BETS), 1)), gains[:, :-1]], axis=1)
        capital = gains + np.logaddexp.accumulate(-held - begun, axis=1)
        return bool(np.logaddexp.reduce(capital).max() >= np.log(1 / delta))

    return 1 - _first(excluded)


def _variances(losses: Losses) -> np.ndarray:
    """v_{t−1} for t = 1 … n; see `betting_p`."""
    times = np.arange(1, len(losses) + 1)
    means = (0.5 + losses.cumsum()) / (times + 1)
    after = (0.25 + ((losses - means) ** 2).cumsum()) / (times + 1)
    return np.concatenate([[0.25], after[:-1]])


def _first(excluded: Callable[[float], bool]) -> float:
    """Where, within [0, 1], risks begin to be excluded, which all larger ones then are."""
    low, high = 0.0, 1.0
    if not excluded(high):
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if excluded(middle) else (middle, high)
    return high


TESTS: dict[str, Callable[..., float]] = {
    "binomial": binomial_p,
    "betting": betting_p,
    "hoeffding-bentkus": hoeffding_bentkus_p,
}
BESIDE = "hoeffding-bentkus"  # is told beside the others, and decides nothing
