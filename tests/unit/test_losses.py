"""Losses against formulas written out, and one step against one graph over everything."""

import dataclasses

import pytest
import torch
from helpers.families import tiny
from helpers.steps import exit_gradients

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning import losses as losses_module
from ee_tuning.config import TuneConfig
from ee_tuning.losses import (
    Objective,
    Teacher,
    confidence,
    cross_entropy,
    distillation,
    likeliest,
)
from ee_tuning.plan.check import check_settings
from ee_tuning.tune.optimizers import (
    build_optimizers,
    clip_gradients,
    learning_rate,
    loss_weights,
)
from ee_tuning.tune.step import Tuner


def sample(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 11, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (2, 5), generator=generator)
    labels[0, 2] = labels[1, 0] = labels[1, 4] = -100
    return logits, labels


def test_cross_entropy_is_a_masked_mean():
    logits, labels = sample()
    terms = [
        -torch.log_softmax(logits[b, t], -1)[labels[b, t + 1]]
        for b in range(2)
        for t in range(4)
        if labels[b, t + 1] != -100
    ]
    loss = cross_entropy(logits, labels)
    assert loss.count == len(terms) == 6
    torch.testing.assert_close(loss.mean(), torch.stack(terms).mean())


@pytest.mark.parametrize(
    ("measure", "least"), [("probability", 0.1), ("margin", 0), ("entropy", 0)]
)
def test_confidence_is_over_the_tokens_that_are_known(measure, least):
    """A reduced vocabulary of 10 tokens of 100: not sure at all, and entirely."""
    logits = torch.full((2, 100), -torch.inf)
    logits[:, 20:30] = 0.0
    logits[1, 25] = 100.0
    expected = torch.tensor([float(least), 1.0])
    torch.testing.assert_close(confidence(logits, measure), expected)


def test_dynamic_weights_are_the_detached_confidence():
    logits, labels = sample()
    cross_entropy(logits, labels, dynamic=True).total.backward()
    grad, logits.grad = logits.grad.clone(), None
    weight = torch.softmax(logits, -1).amax(-1).detach()
    torch.testing.assert_close(confidence(logits), weight)
    total = sum(
        weight[b, t] * -torch.log_softmax(logits[b, t], -1)[labels[b, t + 1]]
        for b in range(2)
        for t in range(4)
        if labels[b, t + 1] != -100
    )
    total.backward()
    torch.testing.assert_close(grad, logits.grad)


def test_distillation_is_the_scaled_divergence():
    logits, labels = sample()
    teacher, _ = sample(1)
    T = 2.0
    p, q = torch.softmax(teacher / T, -1), torch.softmax(logits / T, -1)
    kl = (p * (p / q).log()).sum(-1)[:, :-1] * T**2
    expected = kl[labels[:, 1:] != -100].sum()
    torch.testing.assert_close(distillation(logits, teacher, labels, T).total, expected)
    assert distillation(teacher, teacher, labels, T).total.abs() < 1e-5


def test_nothing_labelled_gives_a_zero_loss():
    logits, labels = sample()
    assert cross_entropy(logits, torch.full_like(labels, -100)).mean() == 0


def batches():
    generator = torch.Generator().manual_seed(3)
    result = []
    for unlabelled in (0, 5):
        ids = torch.randint(3, 96, (2, 9), generator=generator)
        labels = ids.clone()
        labels[:, :unlabelled] = -100
        positions = torch.arange(9).repeat(2, 1)
        result.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return result


def gradients(model):
    return {name: p.grad.clone() for name, p in model.exits.named_parameters()}


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(dynamic_weights=True),
        Objective("kl", kl_temperature=2.0),
        Objective("mixed", kl_weight=0.3, dynamic_weights=True),
        Objective("acceptance", acceptance_weight=0.8),
    ],
)
def test_exit_by_exit_equals_one_graph_over_the_global_batch(objective):
    """Micro-batches with unequal numbers of labels count by their tokens.

    Tolerance: the one graph sums all rows at once.
    """
    weights = {1: 1.0, 2: 0.5, 3: 2.0}
    config = ExitConfig("1,2,3", arch="norm,mlp,layer")
    model = EarlyExitModel.from_base(tiny("llama"), config)
    means = exit_gradients(model, batches(), objective, weights)
    ours = gradients(model)

    model.zero_grad()
    rows = {k: torch.cat([b[k] for b in batches()]) for k in batches()[0]}
    out = model(rows["input_ids"], output_exit_logits=True, output_logits=True)
    final = out.logits
    teacher = final.log_softmax(-1) if objective.loss == "acceptance" else final
    losses = {
        layer: objective(logits, rows["labels"], teacher).mean()
        for layer, logits in out.exit_logits.items()
    }
    sum(weights[layer] * loss for layer, loss in losses.items()).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    for layer, loss in losses.items():
        torch.testing.assert_close(means[layer], loss.detach(), rtol=1e-5, atol=1e-6)


def test_exits_tuned_together_are_the_exits_tuned_alone():
    """Bit for bit, clipping included."""

    def tuned(layers):
        model = EarlyExitModel.from_base(tiny("llama"), ExitConfig(layers, arch="mlp"))
        optimizer = torch.optim.AdamW(model.exits.parameters(), lr=1e-2)
        for _ in range(3):
            exit_gradients(model, batches())
            for layer in model.exit_layers:
                clip_gradients(model.exit(layer), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        return model.exit_state()

    together = tuned("1,3")
    for alone in (tuned("1"), tuned("3")):
        assert all(torch.equal(together[name], p) for name, p in alone.items())


def test_mean_losses_are_the_forward_pass_losses():
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,3", arch="mlp"))
    batch = batches()[1]
    expected = model(batch["input_ids"], labels=batch["labels"]).exit_losses
    assert Tuner(model, {}).mean_losses([batch]) == pytest.approx(
        {k: v.item() for k, v in expected.items()}
    )


def test_the_learning_rate_falls_to_a_tenth_unless_another_end_is_given():
    """A low `lr` alone, too, may be given."""
    for rate in (1e-4, 5e-6):
        config = TuneConfig(lr=rate, layers="1")
        check_settings(config)
        assert learning_rate(config, config.steps) == rate / 10
        assert learning_rate(dataclasses.replace(config, min_lr=0.0), config.steps) == 0.0


def test_schedules():
    config = TuneConfig(
        steps=100, lr=1.0, min_lr=0.1, warmup=0.1, loss_weight_start=0.2, loss_weight_warmup=10
    )
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    config.decay = "linear"
    assert learning_rate(config, 55) == pytest.approx(0.55)
    config.warmup = 20
    assert learning_rate(config, 20) == 1.0
    assert loss_weights(config, [4, 8], 0) == pytest.approx({4: 0.2, 8: 0.2})
    config.loss_weights = [1.0, 2.0]
    assert loss_weights(config, [4, 8], 5) == pytest.approx({4: 0.6, 8: 1.2})
    assert loss_weights(config, [4, 8], 50) == {4: 1.0, 8: 2.0}


@pytest.mark.parametrize("arch", ["embedding", "norm", "mlp", "layer"])
@pytest.mark.parametrize("head", ["own", "shared"])
@pytest.mark.parametrize("loss", ["ce", "kl", "mixed"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_chunks_of_tokens_give_the_loss_and_gradients_of_all_at_once(
    arch, head, loss, dynamic, monkeypatch
):
    """Tolerance: the same fp32 sums in another order."""
    if (arch, head) == ("embedding", "shared"):
        pytest.skip("has no parameters")
    model = EarlyExitModel.from_base(tiny("gemma2"), ExitConfig([2, 3], arch, head=head))
    batch, objective = batches()[0], Objective(loss, 2.0, 0.3, dynamic)
    whole = {}
    descent = model.chain.descend(batch["input_ids"], batch["position_ids"])
    teacher = model.backbone.final_logits(descent.ahead(model.backbone.num_layers))
    for layer in (2, 3):
        logits = model.exit(layer)(descent.to(layer))
        total = objective(logits, batch["labels"], teacher).total
        (0.5 * total).backward()
        whole[layer] = total.detach()
    gradients = [p.grad for p in model.exits.parameters()]
    model.exits.zero_grad(set_to_none=True)

    vocabulary, (rows, length) = model.backbone.config.vocab_size, batch["labels"].shape
    monkeypatch.setattr(losses_module, "LOGITS", 2 * rows * vocabulary)
    seen = []
    for layer in (2, 3):
        original = model.exit(layer).output.known_logits
        monkeypatch.setattr(
            model.exit(layer).output,
            "known_logits",
            lambda x, f=original: seen.append(x.shape[1]) or f(x),
        )
    tuner, descent = Tuner(model, {}, objective), model.chain.descend(batch["input_ids"])
    final = descent.ahead(model.backbone.num_layers)
    teacher = Teacher(model.backbone.final_logits, final, None)
    given = batch["labels"], teacher, torch.tensor(0.5)
    chunked = {layer: tuner.loss(layer, descent.to(layer), *given).total for layer in (2, 3)}
    assert len(seen) == 2 * -(-(length - 1) // 2)
    assert max(seen) == 3 < length
    # A divergence is a small difference of logarithms of a few nats, each rounded to 5e-7.
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    for p, expected in zip(model.exits.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


def test_exits_whose_tokens_are_one_chunk_share_the_teacher(monkeypatch):
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig([1, 2, 3], "norm"))
    calls, original = [], model.backbone.final_logits
    monkeypatch.setattr(
        model.backbone, "final_logits", lambda x: calls.append(x.shape[1]) or original(x)
    )
    assert len(exit_gradients(model, batches()[:1], Objective("kl"))) == 3
    assert calls == [9]


@pytest.mark.parametrize("objective", [Objective(), Objective("mixed")])
def test_micro_batches_side_by_side_or_one_after_another_give_the_same_bits(objective):
    """And side by side, the gradients of one exit exist at a time."""

    def tuned(together):
        model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,3", arch="mlp"))
        optimizers = build_optimizers(model, TuneConfig(lr=1e-2))
        alive = []

        def look(*_):
            alive.append({k for k in (1, 3) if model.exit(k).norm.weight.grad is not None})

        for optimizer in optimizers.values():
            optimizer.register_step_pre_hook(look)
        tuner = Tuner(model, optimizers, objective)
        tuner.together = together
        tuner.step(batches(), {1: 1.0, 3: 0.5})
        return model.exit_state(), alive

    together, alive = tuned(1000)
    alone, _ = tuned(0)
    assert alive == [{1}, {3}]
    assert all(torch.equal(together[name], p) for name, p in alone.items())


@pytest.mark.parametrize("size", [7, 2**15, 2**15 + 1])
def test_the_likeliest_is_the_first_of_the_largest(size):
    torch.manual_seed(size)
    logits = torch.randn(5, 3, size)
    assert torch.equal(likeliest(logits), logits.argmax(-1))
    logits[:, :, size // 2 :] = logits[:, :, :1] = 9.0
    assert not likeliest(logits).any()
    logits[1, 1, size // 2] = torch.nan
    assert likeliest(logits)[1, 1] == size // 2


@pytest.mark.parametrize("size", [7, 2**15, 2**15 + 1])
def test_confidence_in_pieces_is_the_largest_probability(size):
    torch.manual_seed(size)
    logits = 3 * torch.randn(4, 3, size)
    logits[0, :, : size // 3] = logits[1, 1] = -torch.inf
    logits[2, 2, 1] = torch.nan
    expected = torch.exp(logits.amax(-1) - logits.logsumexp(-1))
    assert torch.allclose(confidence(logits), expected, rtol=1e-5, equal_nan=True)


def test_confidence_is_the_largest_probability():
    logits = 3 * torch.randn(4, 640)
    assert torch.allclose(confidence(logits), logits.softmax(-1).amax(-1), rtol=1e-5)
    logits[:, 5:] = -torch.inf
    assert torch.allclose(confidence(logits), logits.softmax(-1).amax(-1), rtol=1e-5)
