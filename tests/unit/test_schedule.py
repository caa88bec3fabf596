"""Balancing stages and simulating their schedule, against the obvious ways."""

from itertools import combinations, pairwise

import pytest
import torch
from helpers.families import tiny

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.config import TuneConfig
from ee_tuning.costs import work
from ee_tuning.plan.simulate import simulate
from ee_tuning.stages import balance, cut_stages
from ee_tuning.tune import timing

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


def test_costs_are_counted_from_the_shapes():
    """FLOP per token: 2 per weight that is only multiplied with, 6 where it is tuned.

    Two thirds of an MLP read hidden states that no gradient goes back to; an embedding exit with a
    shared head has nothing to tune.
    """
    exits = ExitConfig("1,2,3", "mlp,layer,embedding", head="own,shared,shared")
    model = EarlyExitModel(tiny("llama", num_hidden_layers=4, vocab_size=96), exits)
    hidden, length = 32, 10
    head = 96 * hidden
    mlp, layer = (
        sum(p.numel() for p in module.parameters() if p.dim() == 2)
        for module in (model.exit(1).mlp, model.exit(2).block)
    )
    attention = 2 * length * hidden
    frozen = 2 * layer + attention
    assert work(model, length).tuning() == [
        frozen + 4 * mlp * 2 / 3 + 6 * mlp / 3 + 6 * head,
        frozen + 6 * layer + 4 * head + 3 * attention,
        frozen + 2 * head,
    ]


def test_an_exit_with_a_large_head_outweighs_ten_layers():
    backbone = tiny("llama", num_hidden_layers=13, vocab_size=6000)
    model = EarlyExitModel(backbone, ExitConfig("1,13", "norm"))
    costs = work(model, 10).tuning()
    assert costs[0] > sum(costs[1:11])
    assert cut_stages(costs, 2) == [range(0, 6), range(6, 13)]


def test_the_schedule_of_one_stage_is_its_work():
    found = simulate([2.0], [3.0], 4)
    assert found.seconds == pytest.approx(4 * 5.0)
    assert found.idle == pytest.approx(0.0)


def test_exits_that_wait_for_the_last_stage_do_not_leave_others_without_work():
    """Two stages, three micro-batches, by hand: stage 1 does F F E F E E, E from 1 + 1 on."""
    found = simulate([1.0, 1.0], [2.0, 2.0], 3, steps=1, teacher=True)
    assert found.seconds == pytest.approx(1 + 3 * 3)  # the second stage waits at the start alone
    # Its last exit work follows stage 2's last forward, and ends that much later than stage 2's.
    waits = simulate([1.0, 1.0], [2.0, 2.0], 3, send=0.5, steps=1, teacher=True)
    assert waits.seconds == pytest.approx(1 + 0.5 + 3 * 3 + 0.5)
    # The first stage's only micro-batch waits for the second stage's layers.
    assert simulate([1.0, 4.0], [2.0, 0.0], 1, steps=1, teacher=True).seconds == pytest.approx(7.0)
    assert simulate([1.0, 4.0], [2.0, 0.0], 1, steps=1).seconds == pytest.approx(5.0)


def test_the_first_step_fills_the_pipeline():
    """Two stages, two micro-batches, by hand: stage 2 waits for 1 + 0.5, then 1 + 1 each time."""
    assert simulate([1.0, 1.0], [1.0, 1.0], 2, send=0.5, steps=1).seconds == pytest.approx(5.5)


@pytest.mark.parametrize(
    ("together", "seconds"),
    [
        ([False, False], 5.0),
        ([False, True], 6.0),  # stage 2 gets hidden states at 1 and 3, and begins its exits at 4
        ([True, False], 5.0),  # at 1 and 2, and both have been through exits at 5
        ([True, True], 5.0),
    ],
)
def test_each_stage_has_its_order(together, seconds):
    """Two stages, two micro-batches, by hand."""
    found = simulate([1.0, 1.0], [1.0, 1.0], 2, steps=1, together=together)
    assert found.seconds == pytest.approx(seconds)
    assert found.idle == pytest.approx(1 - 8 / (2 * seconds))


def test_stages_are_two_steps_apart_at_most():
    """A micro-batch takes 8 s through 8 stages; two steps of one each are under way at a time."""
    assert simulate([1.0] * 8, [0.0] * 8, 1).seconds == pytest.approx(8 / 2)
    assert simulate([1.0] * 8, [0.0] * 8, 8).seconds == pytest.approx(8.0)


def test_the_dearest_stage_sets_the_pace():
    found = simulate([1.0, 1.0], [0.0, 2.0], 4)
    assert found.seconds == pytest.approx(4 * 3.0)
    assert found.idle == pytest.approx(1 - (4 + 12) / 24)


def measurable(**settings):
    exits = ExitConfig("2,3", "mlp,layer", head="own,shared")
    return EarlyExitModel(tiny("gemma3"), exits), TuneConfig(
        seq_length=16, micro_batch_size=2, **settings
    )


def test_one_of_each_kind_is_measured(monkeypatch):
    """The layers of gemma3 slide and see all in turn; each exit is measured after its own kind."""
    asked = []

    def seconds(small, spec, *_):
        asked.append((small.layer_types, spec.arch, spec.head))
        return (1.0 if "sliding" in small.layer_types[0] else 2.0), {"mlp": 10.0, "layer": 20.0}[
            spec.arch
        ]

    monkeypatch.setattr(timing, "seconds", seconds)
    model, config = measurable(pp=2)
    costs = timing.measured_costs(model, config, torch.device("cpu"), torch.float32)
    assert costs == [1.0, 2.0 + 10.0, 1.0 + 20.0]
    slides, sees_all = "sliding_attention", "full_attention"
    assert asked == [
        ([slides, sees_all], "layer", "shared"),
        ([sees_all, sees_all], "mlp", "own"),
    ]
    assert cut_stages(costs, config.pp) == [range(0, 2), range(2, 3)]


@pytest.mark.parametrize("exit_vocab", [0, 50])
def test_costs_are_measured_without_touching_the_random_state(exit_vocab):
    model, config = measurable(pp=2, exit_vocab=exit_vocab, dynamic_weights=True)
    before = torch.get_rng_state()
    costs = timing.measured_costs(model, config, torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(costs) == 3
    assert all(0 < cost < 10 for cost in costs)
    assert costs[2] > costs[0]  # the same kind of layer, and an exit


def test_an_exit_without_parameters_has_a_cost():
    model = EarlyExitModel(tiny("llama"), ExitConfig("1,2", "embedding,norm", head="shared"))
    config = TuneConfig(seq_length=16, pp=2)
    costs = timing.measured_costs(model, config, torch.device("cpu"), torch.float32)
    assert all(cost > 0 for cost in costs)
