"""What makes tuning fast and small, against the plain computation it stands in for."""

import copy
from contextlib import nullcontext

import pytest
import torch
from helpers.families import tiny
from helpers.steps import exit_gradients
from torch._dynamo.utils import counters
from torch.nn import functional

from ee_tuning import EarlyExitModel, ExitConfig, varlen
from ee_tuning.adapter import saved_config
from ee_tuning.config import TuneConfig
from ee_tuning.errors import UserError
from ee_tuning.losses import Objective
from ee_tuning.quantise.fp8 import Fp8Linear, freeze_in_fp8, quantise, tune_in_fp8
from ee_tuning.tune import optimizers, step
from ee_tuning.tune.setup import prepare
from ee_tuning.vocabulary import count_tokens, enough, most_frequent

NO_FP8 = "has no fp8 matrix units"


def batch(rows=2, length=16):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length).repeat(rows, 1)}


def gradients(model, objective=None):
    weights = dict.fromkeys(model.exit_layers, 1.0)
    losses = exit_gradients(model, [batch()], objective, weights)
    tuned = [(name, p) for name, p in model.exits.named_parameters() if p.requires_grad]
    found = {name: p.grad.clone() for name, p in tuned}
    model.zero_grad()
    return losses, found


def rounded(module):
    """Every linear weight rounded to what fp8 with row-wise scales can hold, in place."""
    for linear in module.modules():
        if type(linear) is torch.nn.Linear:
            weight, scale = quantise(linear.weight.detach())
            linear.weight.data = weight.float() * scale


def test_quantised_rows_are_within_half_a_step():
    """e4m3 has 3 bits after the point: a relative error of at most 2⁻⁴ down to 2⁻⁶ of its range,
    an absolute one of 2⁻¹⁰ below."""
    x = torch.randn(64, 256) * torch.logspace(-6, 6, 64)[:, None]
    values, scale = quantise(x)
    error = (values.float() * scale - x).abs()
    assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.0001).all()
    assert torch.equal(quantise(torch.zeros(2, 16))[0].float(), torch.zeros(2, 16))


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "gemma2", "cohere"])
@pytest.mark.parametrize("head", ["own", "shared"])
def test_fp8_backbone_is_the_backbone_with_rounded_weights(family, head):
    """Losses and gradients. Tolerance: the sums of a gradient through the head run otherwise."""
    config = ExitConfig("1,3", "mlp", head=head)
    plain = EarlyExitModel.from_base(tiny(family), config)
    for layer in plain.backbone.layers:
        rounded(layer)
    if head == "shared":
        shared = copy.deepcopy(plain.backbone.head)  # not the embedding that it may be tied to
        rounded(shared)
        plain.backbone.head.weight = shared.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=NO_FP8):
        model = EarlyExitModel.from_base(tiny(family), config, backbone_precision="fp8")
    expected, found = gradients(plain), gradients(model)
    for layer in (1, 3):
        torch.testing.assert_close(found[0][layer], expected[0][layer], rtol=1e-5, atol=1e-6)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_fp8_backbone_takes_a_byte_per_weight_and_keeps_its_fingerprint():
    plain = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,3", "mlp"))
    with pytest.warns(UserWarning, match=NO_FP8):
        model = EarlyExitModel.from_base(
            tiny("llama"), ExitConfig("1,3", "mlp"), backbone_precision="fp8"
        )
    modules = [m for layer in model.backbone.layers for m in layer.modules()]
    linears = [m for m in modules if isinstance(m, Fp8Linear)]
    assert len(linears) == 4 * 7
    assert all(linear.weight.itemsize == 1 for linear in linears)
    assert saved_config(model) == saved_config(plain)


def test_fp8_backbone_without_linear_layers_is_refused():
    with (
        pytest.warns(UserWarning, match=NO_FP8),
        pytest.raises(UserError, match="no linear matrices"),
    ):
        EarlyExitModel.from_base(tiny("gpt2"), ExitConfig("1", "mlp"), backbone_precision="fp8")


def test_linear_tuned_in_fp8_is_the_linear_on_rounded_values():
    """All three products against the same with operands rounded by hand."""
    linear = torch.nn.Linear(32, 48)
    x, dy = torch.randn(5, 32, requires_grad=True), torch.randn(5, 48)

    def round_rows(values):
        rows, scale = quantise(values)
        return rows.float() * scale

    weight = linear.weight.detach().clone()
    expected = functional.linear(x, round_rows(weight), linear.bias)
    dx, dw = dy @ round_rows(weight.t().contiguous()).t(), dy.t() @ round_rows(x.t()).t()
    tune_in_fp8(linear)
    y = linear(x)
    y.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(linear.weight.grad, dw)
    torch.testing.assert_close(linear.bias.grad, dy.sum(0))


def test_gradient_through_a_frozen_fp8_head():
    linear = torch.nn.Linear(32, 48, bias=False).requires_grad_(False)
    x, dy = torch.randn(5, 32, requires_grad=True), torch.randn(5, 48)
    weight, scale = quantise(linear.weight)
    freeze_in_fp8(linear, backward=True)
    linear(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ (weight.float() * scale))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Objective(), Objective("mixed", dynamic_weights=True)])
def test_compiled_step_equals_the_eager_one_and_compiles_once(objective):
    """Tolerance: fused kernels add up in another order."""
    torch._dynamo.reset()
    counters.clear()
    config = ExitConfig("1,2,3", "mlp,mlp,layer")
    expected = gradients(
        prepare(EarlyExitModel.from_base(tiny("llama"), config), TuneConfig()), objective
    )
    model = prepare(EarlyExitModel.from_base(tiny("llama"), config), TuneConfig(compile="on"))
    found = gradients(model, objective)
    for layer in model.exit_layers:
        torch.testing.assert_close(found[0][layer], expected[0][layer], rtol=1e-4, atol=1e-5)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-5, msg=name)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs < 16
    for _ in range(3):
        gradients(model, objective)
    assert counters["stats"]["unique_graphs"] == graphs


def test_boundaries_are_where_documents_begin():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]])
    found = varlen.boundaries(positions).flatten().tolist()
    assert found[:6] == [0, 3, 5, 7, 8, 10]
    assert set(found[6:]) == {10}
    assert len(found) == 64


def test_attention_without_boundaries_is_the_models_own():
    model, other = tiny("llama"), tiny("llama")
    varlen.use_varlen(other)
    ids = batch()["input_ids"]
    assert torch.equal(model(ids).logits, other(ids).logits)
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    found = other(ids, attention_mask=padded).logits
    assert torch.equal(model(ids, attention_mask=padded).logits, found)


def test_matrices_cast_once_give_the_gradients_of_matrices_cast_every_time(monkeypatch):
    """Bit for bit, over micro-batches; and the parameters are back in their places."""
    weights = {1: 1.0, 3: 0.5}

    def found():
        model = EarlyExitModel.from_base(tiny("llama").bfloat16(), ExitConfig("1,3", "mlp,layer"))
        model.exits.float()
        before = list(model.exits.parameters())
        batches = list(map(batch, range(1, 6)))
        losses = exit_gradients(model, batches, Objective(), weights, torch.bfloat16)
        assert all(p is q for p, q in zip(before, model.exits.parameters(), strict=True))
        return losses, [p.grad for p in before]

    ours = found()
    monkeypatch.setattr(step, "working_copies", lambda *_: nullcontext(optimizers.HandedOver()))
    plain = found()
    assert all(torch.equal(ours[0][k], v) for k, v in plain[0].items())
    assert all(torch.equal(a, b) for a, b in zip(ours[1], plain[1], strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("waiting", [0, 2**20])
def test_gradients_added_in_pairs_are_the_sum_one_after_the_other(waiting, fused, monkeypatch):
    """Bit for bit, of even and odd numbers, and where one micro-batch gives several."""
    monkeypatch.setattr(optimizers, "WAITING", waiting)
    generator = torch.Generator().manual_seed(0)
    for shape, counts in (((30, 7), (1,)), ((30, 7), (1, 1, 1, 1)), ((64, 16), (1, 3, 1, 1, 1))):
        p, copy = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        handed, expected = optimizers.HandedOver(), torch.zeros(shape)
        for count in counts:
            for _ in range(count):
                copy.grad = torch.randn(shape, generator=generator)
                expected += copy.grad
                handed.take(p, copy)
                assert copy.grad is None
            handed.add_pairs(fused)
        handed.add_rest()
        assert torch.equal(p.grad, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "llama-tied-bias"])
@pytest.mark.parametrize("objective", [Objective(), Objective("mixed", dynamic_weights=True)])
def test_reduced_vocabulary_is_the_whole_one_without_the_other_tokens(family, objective):
    """Losses and gradients against a whole vocabulary of which only some logits are looked at."""
    config = ExitConfig("1,3", "mlp", head="own,shared")
    tokens = torch.arange(0, 96, 2)
    model = EarlyExitModel.from_base(tiny(family), config)
    model.reduce_vocabulary(tokens)
    losses, found = gradients(model, objective)

    whole = EarlyExitModel.from_base(tiny(family), config)
    ids = batch()["input_ids"]
    labels = torch.where(ids % 2 == 0, ids, -100)
    out = whole(ids, output_exit_logits=True, output_logits=True)
    for layer, logits in out.exit_logits.items():
        places = torch.where(labels < 0, -100, labels // 2)
        loss = objective(logits[..., tokens], places, out.logits[..., tokens]).mean()
        torch.testing.assert_close(losses[layer], loss.detach(), rtol=1e-5, atol=1e-6)
        loss.backward()
    for name, p in whole.exits.named_parameters():
        grad = p.grad[tokens] if "head" in name else p.grad
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6, msg=name)
    after = model(ids, labels=ids, output_exit_logits=True)
    assert torch.isneginf(after.exit_logits[1][..., 1::2]).all()
    torch.testing.assert_close(after.exit_logits[1][..., tokens], out.exit_logits[1][..., tokens])
    if objective == Objective():
        torch.testing.assert_close(after.exit_losses[1].detach(), losses[1], rtol=1e-5, atol=1e-6)


def test_reduced_vocabulary_of_a_shared_fp8_head():
    config = ExitConfig("1", "mlp", head="shared")
    with pytest.warns(UserWarning, match=NO_FP8):
        model = EarlyExitModel.from_base(tiny("llama"), config, backbone_precision="fp8")
    ids = batch()["input_ids"]
    whole = model(ids, output_exit_logits=True).exit_logits[1]
    tokens = torch.tensor([1, 5, 90])
    model.reduce_vocabulary(tokens)
    reduced = model(ids, output_exit_logits=True).exit_logits[1]
    torch.testing.assert_close(reduced[..., tokens], whole[..., tokens])
    gradients(model)


def test_most_frequent_tokens():
    labels = torch.tensor([[7, 7, 7, 2, 2, -100, 5, 1]])
    counts = count_tokens([{"labels": labels}], 10)
    assert most_frequent(counts, 4).tolist() == [1, 2, 5, 7]
    assert most_frequent(counts, 5).tolist() == [0, 1, 2, 5, 7]
    with pytest.raises(UserError, match="between 1 and 10"):
        most_frequent(counts, 11)


def test_as_many_tokens_as_cover_99_percent_in_steps_of_64():
    counts = torch.zeros(10_000, dtype=torch.int64)
    counts[200:400], counts[:100] = 98, 4  # 98% of 20,000
    assert enough(counts) == 256
    counts[200:400], counts[:100] = 100, 0  # 198 would do
    assert enough(counts) == 256
    counts[200:392], counts[392:400] = 125, 0  # 191
    assert enough(counts) == 192
    assert enough(counts[:8191]) == 0, "a small vocabulary is worth nothing"
    assert enough(torch.ones(10_000, dtype=torch.int64)) == 0, "nearly all would be needed"


@pytest.mark.parametrize(
    ("settings", "picks", "known"),
    [
        ({}, False, 0),
        ({"loss": "kl"}, False, 0),
        ({"loss": "acceptance"}, True, 0),
        ({"loss": "acceptance", "exit_vocab": 0}, False, 0),
        ({"loss": "acceptance", "exit_vocab": 64}, False, 64),
        ({"loss": "acceptance", "tp": 2}, True, 0),
        ({"loss": "acceptance", "exits": "old"}, False, 0),
        ({"arch": "draft,mlp"}, True, 0),
    ],
)
def test_exits_that_draft_know_what_the_data_say(settings, picks, known):
    config = TuneConfig(**settings)
    assert (config.picks_vocabulary, config.known_tokens) == (picks, known)
