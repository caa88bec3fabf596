"""Balancing stages and simulating their schedule, against the obvious ways."""

from itertools import combinations, pairwise

import pytest

from ee_tuning.parallel.pipeline import balance
from ee_tuning.parallel.simulate import simulate

COSTS = [3.0, 1.0, 1.0, 9.0, 1.0, 2.0, 2.0, 5.0]


@pytest.mark.parametrize("stages", range(1, 9))
def test_stages_are_balanced_as_well_as_any_cut(stages):
    found = balance(COSTS, stages)
    assert len(found) == stages
    assert sum(found) == len(COSTS)
    assert min(found) >= 1

    def dearest(stops):
        edges = [0, *stops, len(COSTS)]
        return max(sum(COSTS[a:b]) for a, b in pairwise(edges))

    best = min(dearest(stops) for stops in combinations(range(1, len(COSTS)), stages - 1))
    stops = [sum(found[: i + 1]) for i in range(stages - 1)]
    assert dearest(stops) == best


def test_an_exit_weighs_in_the_balance():
    assert balance([1, 1, 1, 1, 1, 1], 2) == [3, 3]
    assert balance([1, 11, 1, 1, 1, 1], 2) == [2, 4]


def test_the_schedule_of_one_stage_is_its_work():
    found = simulate([2.0], [3.0], 4)
    assert found.seconds == pytest.approx(4 * 5.0)
    assert found.idle == pytest.approx(0.0)


def test_the_first_step_fills_the_pipeline():
    """Two stages, two micro-batches, by hand: stage 2 waits for 1 + 0.5, then 1 + 1 each time."""
    assert simulate([1.0, 1.0], [1.0, 1.0], 2, send=0.5, steps=1).seconds == pytest.approx(5.5)


def test_the_dearest_stage_sets_the_pace():
    found = simulate([1.0, 1.0], [0.0, 2.0], 4)
    assert found.seconds == pytest.approx(4 * 3.0)
    assert found.idle == pytest.approx(1 - (4 + 12) / 24)
