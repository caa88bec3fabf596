"""From careful to bold: which thresholds are tried, on which prompts, and where trying ends.

Fixed-sequence testing of Learn then Test (arXiv 2110.01052, section 5.1): an order of candidates is
chosen on some prompts; on others they are tested one after the other, each at level delta, until
one fails. The probability that any that passed has a larger risk than epsilon is at most delta.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ee_tuning.calibrate.bounds import BESIDE, TESTS, check_losses
from ee_tuning.calibrate.risks import OFF, Along, Measured, Risk, Thresholds

SHARES = (0.4, 0.4, 0.2)  # of the prompts: to order the candidates, to test them, to report
FINE = (0.002, 0.005, *(n / 100 for n in range(1, 101)))  # shares of tokens that may leave
COARSE = (0.01, *(n / 20 for n in range(1, 21)))
BELOW_OFF = 1 - 2**-24  # the next fp32 number


@dataclass(frozen=True)
class Split:
    """Numbers of the prompts that order candidates, test them, and report; each once."""

    order: np.ndarray
    test: np.ndarray
    report: np.ndarray


def split(prompts: int, seed: int, ordered: bool = False) -> Split:
    """`SHARES` of so many prompts, drawn. ordered: the candidates are, and their share tests."""
    numbers = np.random.default_rng(seed).permutation(prompts)
    first = 0 if ordered else int(SHARES[0] * prompts)
    last = size_of_test(prompts, ordered) + first
    return Split(numbers[:first], numbers[first:last], numbers[last:])


def size_of_test(prompts: int, ordered: bool = False) -> int:
    """How many of so many prompts test."""
    return int(prompts * (SHARES[1] + (SHARES[0] if ordered else 0)) + 1e-9)


# -- candidates ----------------------------------------------------------------------------------


def bars(risk: Along, prompts: np.ndarray, shares: Sequence[float]) -> dict[int, list[float]]:
    """By exit, the thresholds at which such shares of its tokens would leave, of these prompts."""
    seen, found = risk.seen, {}
    # The token after a prompt never leaves.
    there = np.arange(seen.sure.shape[2]) < seen.lengths[prompts][:, None]
    there[:, 0] = False
    for e, layer in enumerate(seen.layers):
        sure = seen.sure[prompts, e][there]
        values = np.quantile(sure, [1 - share for share in shares], method="higher")
        found[layer] = [min(float(value), BELOW_OFF) for value in values] if len(sure) else []
    return found


def by_quantile(risk: Along, prompts: np.ndarray, shares: Sequence[float]) -> list[Thresholds]:
    """The same share of every exit's own tokens, more and more."""
    values = bars(risk, prompts, shares)
    return distinct([dict(zip(values, one, strict=True)) for one in zip(*values.values())])  # noqa: B905


def by_pareto(risk: Along, prompts: np.ndarray, shares: Sequence[float]) -> list[Thresholds]:
    """One exit after the other is loosened a little: always the one that saves most layers for the
    risk that it adds, on these prompts. Gives what no other of these steps beats in both."""
    values = bars(risk, prompts, shares)
    at = dict.fromkeys(values, -1)

    def measured(places: dict[int, int]) -> tuple[float, float, Thresholds]:
        one = {k: values[k][place] if place >= 0 else OFF for k, place in places.items()}
        found = risk.measure(one, prompts)
        return float(found.losses.mean()), found.depth, one

    here, steps = measured(at), []
    while options := [k for k, place in at.items() if place + 1 < len(values[k])]:
        tried = {k: measured(at | {k: at[k] + 1}) for k in options}
        # A risk that does not grow is bought for next to nothing.
        worth = {k: (here[1] - t[1]) / max(t[0] - here[0], 1e-9) for k, t in tried.items()}
        best = max(options, key=lambda k: worth[k])
        at[best], here = at[best] + 1, tried[best]
        steps.append(here)
    front, least = [], np.inf
    for _, depth, one in sorted(steps, key=lambda step: step[:2]):
        if depth < least:
            front.append(one)
            least = depth
    return distinct(front)


def distinct(candidates: Sequence[Thresholds]) -> list[Thresholds]:
    """Without those that are as the one before them."""
    pairs = zip([None, *candidates[:-1]], candidates, strict=True)
    return [one for before, one in pairs if one != before]


# -- the walk ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A candidate, its mean loss on the n prompts that test, the p-value, and that of another test
    beside it; depth: the mean layer at which tokens left."""

    thresholds: Thresholds
    risk: float
    depth: float
    n: int
    p: float
    beside: float

    def to_json(self) -> dict[str, Any]:
        """As a certificate keeps it."""
        return {
            "thresholds": {str(layer): value for layer, value in self.thresholds.items()},
            "risk": self.risk, "depth": self.depth, "p": self.p, BESIDE: self.beside,
        }  # fmt: skip


def walk(
    candidates: Sequence[Thresholds],
    risk: Risk,
    prompts: np.ndarray,
    epsilon: float,
    delta: float,
    test: str,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Test `candidates` in their order on `prompts`, which had no say in it, up to the first that
    fails: its p-value is above `delta`. Gives all steps; on_step: told each.

    Raises:
        UserError: the losses are not one within [0, 1] per prompt.
    """
    steps: list[Step] = []
    for thresholds in candidates:
        found: Measured = risk.measure(thresholds, prompts)
        losses = check_losses(found.losses)
        steps.append(
            Step(
                thresholds, float(losses.mean()), found.depth, len(losses),
                TESTS[test](losses, epsilon, delta), TESTS[BESIDE](losses, epsilon, delta),
            )
        )  # fmt: skip
        on_step(steps[-1])
        if steps[-1].p > delta:
            break
    return steps


def answer(steps: Sequence[Step], delta: float) -> Step | None:
    """The last that passed."""
    return next((step for step in reversed(steps) if step.p <= delta), None)
