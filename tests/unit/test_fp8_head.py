"""A shared head in fp8 with its loss and gradient in one go, against the loss of its logits."""

import pytest
import torch
from helpers.families import tiny
from helpers.steps import exit_gradients

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.losses import Objective
from ee_tuning.quantise.fp8 import Fp8Linear, freeze_in_fp8, head_loss, loss_and_gradient

# e4m3 rounds a value by 2⁻⁴ at most, and what is below 2⁻⁶ of its range by 2⁻¹⁰ of its scale.
ROUNDING = 2**-4


def sample():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 50, generator=generator)
    targets = torch.randint(0, 50, (12,), generator=generator)
    logits[3, targets[3]] = 20.0  # as good as sure
    targets[5] = -100
    return logits, targets, torch.rand(50, 1, generator=generator) + 0.1


def test_loss_is_exact_and_the_gradient_rounded_with_the_rows_own_largest_value():
    logits, targets, scale = sample()
    logits.requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    total, values, row_scale = loss_and_gradient(logits.detach(), targets, scale)
    torch.testing.assert_close(total, expected.detach())
    gradient = logits.grad * scale.t()
    known = targets >= 0
    largest = gradient.abs().amax(-1, keepdim=True)
    # Where a probability is 1 but for fp32's rounding, what is left of 1 − p is rounding, too.
    torch.testing.assert_close(row_scale[known] * 448, largest[known], rtol=1e-4, atol=1e-6)
    error = (values.float() * row_scale - gradient).abs()[known]
    allowed = torch.maximum(gradient.abs() * ROUNDING, row_scale * 2**-9)[known]
    assert (error <= allowed.clamp(min=1e-6)).all()
    assert not values.float()[~known].any()


def test_head_loss_gives_the_gradient_of_its_input():
    linear = torch.nn.Linear(32, 64, bias=False)
    freeze_in_fp8(linear, backward=True)
    assert type(linear) is Fp8Linear
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(9) * 5
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    (0.5 * head_loss(linear, found, targets)).backward()
    loss = torch.nn.functional.cross_entropy(linear(expected), targets, reduction="sum")
    (0.5 * loss).backward()
    assert (found.grad - expected.grad).norm() < ROUNDING * expected.grad.norm()


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
def test_steps_take_it_and_their_losses_and_gradients_are_near(is_compiled):
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(16).repeat(2, 1)}
    found = []
    for fuses in (False, True):
        with pytest.warns(UserWarning, match="no fp8 matrix units"):
            model = EarlyExitModel.from_base(
                tiny("llama"), ExitConfig("1,3", "mlp", head="shared"), backbone_precision="fp8"
            )
        if fuses:
            for layer in model.exit_layers:
                model.exit(layer).output.fuse(model.backbone, native_only=False)
        assert (model.exit(1).output.fused is not None) == fuses
        if is_compiled:
            model.chain.compile()
        losses = exit_gradients(model, [batch], Objective(), {1: 1.0, 3: 2.0})
        found.append((losses, {k: p.grad for k, p in model.exits.named_parameters()}))
    for layer, loss in found[0][0].items():
        torch.testing.assert_close(found[1][0][layer], loss)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() < 2 * ROUNDING * gradient.norm()


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_heads_that_scale_or_cap_their_logits_do_not_take_it(family):
    with pytest.warns(UserWarning, match="no fp8 matrix units"):
        model = EarlyExitModel.from_base(
            tiny(family), ExitConfig("1", "mlp", head="shared"), backbone_precision="fp8"
        )
    head = model.exit(1).output
    head.fuse(model.backbone, native_only=False)
    assert head.fused is None
