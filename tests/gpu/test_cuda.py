"""The same code on a GPU in bf16: runs where there is one, and is skipped elsewhere."""

import pytest
import torch
from helpers.families import tiny
from helpers.steps import exit_gradients
from torch._dynamo.utils import counters

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.config import TuneConfig
from ee_tuning.losses import Objective
from ee_tuning.passes.cache import Rings
from ee_tuning.quantise.fp8 import has_fp8, product, quantise
from ee_tuning.quantise.packages import PACKAGES
from ee_tuning.tune.optimizers import build_optimizers
from ee_tuning.tune.setup import prepare
from ee_tuning.tune.step import Tuner

FP8 = "fp8" if torch.cuda.is_available() and has_fp8(torch.device("cuda")) else "same"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def batch():
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(32).repeat(4, 1)}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("arch", ["norm", "mlp", "layer"])
def test_bf16_tuning_lowers_the_loss_and_leaves_the_backbone(family, arch):
    model = EarlyExitModel.from_base(
        tiny(family).to("cuda", torch.bfloat16), ExitConfig("1,3", arch)
    )
    model.exits.float()
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    optimizers = build_optimizers(model, TuneConfig(lr=1e-2))
    tuner = Tuner(model, optimizers, Objective("mixed"), clip=1.0, autocast=torch.bfloat16)
    first = tuner.mean_losses([batch()])
    for _ in range(10):
        tuner.step([batch()], dict.fromkeys(model.exit_layers, 1.0))
    last = tuner.mean_losses([batch()])
    assert all(last[layer] < first[layer] for layer in (1, 3))
    assert all(torch.equal(v, model.model.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_depth_is_transformers_generate_and_exits_leave(dtype):
    base = tiny("llama").to("cuda", dtype)
    model = EarlyExitModel.from_base(base, ExitConfig("1,2,3", "mlp,norm,layer"))
    ids = torch.tensor([[5, 9, 11]], device="cuda")
    expected = base.generate(ids, max_new_tokens=20, do_sample=False)
    found = model.generate(ids, mode="full", max_new_tokens=20, compile=False)
    assert torch.equal(found.sequences, expected)
    out = model.generate(ids, threshold=0.0, max_new_tokens=20, eos_token_id=None, compile=False)
    assert set(out.exit_layers[0].tolist()) == {1, 4}


def packed_batch():
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(20), torch.arange(12)]).repeat(4, 1)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


@pytest.mark.parametrize("rows", [packed_batch, batch])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_attention_within_boundaries_is_the_masked_one(family, rows):
    """bf16: relative difference of the hidden states of 2⁻⁶, a few roundings of 2⁻⁹ each."""
    config = ExitConfig("2,4", "layer")
    plain, fast = (
        EarlyExitModel.from_base(tiny(family).to("cuda", torch.bfloat16), config) for _ in range(2)
    )
    prepare(fast, TuneConfig(compile="off"))
    fast.exits.to(torch.bfloat16)
    assert fast.chain.takes_boundaries
    given = {k: v.cuda() for k, v in rows().items()}
    expected = plain.chain.descend(given["input_ids"], given["position_ids"])
    given = Tuner(fast, {}).place(rows())
    found = fast.chain.descend(given["input_ids"], given["position_ids"], given["boundaries"])
    for layer in (2, 4):
        a, b = expected.to(layer), found.to(layer)
        assert (a.hidden - b.hidden).norm() < 2**-6 * a.hidden.norm()
        x, y = (m.exit(layer).features(s) for m, s in ((plain, a), (fast, b)))
        assert (x - y).norm() < 2**-6 * x.norm()


def test_step_compiles_once_and_never_waits_for_the_device():
    config = ExitConfig("1,2,4", "mlp,layer,mlp", head="own,own,shared")
    settings = TuneConfig(lr=1e-2, compile="on", exit_precision=FP8)
    model = EarlyExitModel.from_base(
        tiny("llama", vocab_size=128, intermediate_size=64).to("cuda", torch.bfloat16),
        config,
        backbone_precision=FP8,
    )
    prepare(model, settings)
    optimizers = build_optimizers(model, settings)
    weights = dict.fromkeys(model.exit_layers, 1.0)

    def step(objective):
        tuner = Tuner(model, optimizers, objective, clip=1.0, autocast=torch.bfloat16)
        found = tuner.step([packed_batch(), packed_batch()], weights)
        return found.losses, found.norms

    for objective in (Objective(), Objective("mixed", dynamic_weights=True)):
        first, _ = step(objective)
        graphs = counters["stats"]["unique_graphs"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                last, norms = step(objective)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert counters["stats"]["unique_graphs"] == graphs
        assert all(norm > 1e-3 for norm in norms.values())
        # Weighted by confidences, which rise, a loss need not fall.
        falls = not objective.dynamic_weights
        assert not falls or all(last[layer] < first[layer] for layer in first)


@pytest.mark.parametrize("settings", [
    {"backbone_precision": "torchao-int8", "optimizer": "adamw-8bit", "master_weights": "bf16"},
    {"backbone_precision": FP8},
])  # fmt: skip
def test_steps_of_whole_rows_compile_once_never_wait_and_take_cudnn(settings):
    """Dense attention, rounding seeded on the host, gradients added in pairs.

    The profiler names the kernels: cuDNN's is expected on Hopper and later only.
    """
    settings = TuneConfig(lr=1e-2, compile="on", **settings)
    if settings.optimizer != "adamw":
        pytest.importorskip("torchao")
    model = EarlyExitModel.from_base(
        tiny("llama", vocab_size=128, hidden_size=256, intermediate_size=512, head_dim=64)
        .to("cuda", torch.bfloat16),
        ExitConfig("1,2,4", "mlp,layer,mlp", head="own,own,shared"),
        backbone_precision=settings.backbone_precision,
    )  # fmt: skip
    prepare(model, settings)
    optimizers = build_optimizers(model, settings)
    weights = dict.fromkeys(model.exit_layers, 1.0)
    tuner = Tuner(model, optimizers, clip=1.0, autocast=torch.bfloat16)

    def step():
        return tuner.step([batch(), batch(), batch()], weights).losses

    first = step()
    step()
    graphs = counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            last = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == graphs
    assert all(last[layer] < first[layer] for layer in first)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    names = [event.key.lower() for event in profile.key_averages()]
    if torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability() >= (9, 0):
        assert any("cudnn" in name and ("sdpa" in name or "fprop" in name) for name in names)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and has_fp8(torch.device("cuda"))),
    reason="needs fp8 matrix units",
)
def test_loss_and_gradient_of_a_shared_fp8_head_in_one_go_are_those_of_its_logits():
    """Gradients through fp8: within 2⁻³ of their norm, e4m3 rounding by 2⁻⁴ at most each time."""
    found = []
    for fuses in (False, True):
        model = EarlyExitModel.from_base(
            tiny("llama").to(torch.bfloat16), ExitConfig("1,3", "mlp", head="shared"),
            device="cuda", backbone_precision="fp8",
        )  # fmt: skip
        prepare(model, TuneConfig(compile="on"))
        assert model.exit(1).output.fused is not None
        for layer in () if fuses else model.exit_layers:
            model.exit(layer).output._parts["fused"] = None
        given = [batch()], Objective(), {1: 1.0, 3: 2.0}, torch.bfloat16
        losses = exit_gradients(model, *given)
        found.append((losses, {k: p.grad for k, p in model.exits.named_parameters()}))
    for layer, loss in found[0][0].items():
        torch.testing.assert_close(found[1][0][layer], loss, rtol=1e-3, atol=1e-3)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() < 2**-3 * gradient.norm()


@pytest.mark.parametrize("precision", PACKAGES)
def test_quantised_layers_are_near_and_their_exits_exact(precision):
    """Of the norm: 8 bits round to 1%, nf4 is off by an eighth in each product of three layers."""
    pytest.importorskip(PACKAGES[precision])
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    base = [tiny("llama", **sizes).to(torch.bfloat16) for _ in range(2)]
    plain, kept = (
        EarlyExitModel.from_base(
            model, ExitConfig("1,3"), device="cuda", backbone_precision=name
        )
        for model, name in zip(base, ("same", precision), strict=True)
    )  # fmt: skip
    assert kept.tensor_hashes == plain.tensor_hashes
    a, b = plain.exit_state(), kept.exit_state()
    assert all(torch.equal(a[name], b[name]) for name in a)
    ids = batch()["input_ids"].cuda()
    descents = [model.chain.descend(ids) for model in (plain, kept)]
    for layer in plain.exit_layers:
        x, y = (descent.to(layer) for descent in descents)
        near = 0.6 if precision == "bnb-4bit" else 0.1
        assert (x.hidden - y.hidden).norm() < near * x.hidden.norm()


@pytest.mark.skipif(
    not (torch.cuda.is_available() and has_fp8(torch.device("cuda"))),
    reason="needs fp8 matrix units",
)
def test_fp8_products_are_those_of_the_rounded_operands():
    """bf16 results of sums in reduced precision (fast accumulation): 2⁻⁷ of the norm."""
    x = torch.randn(50, 256, device="cuda", dtype=torch.bfloat16)
    weight, scale = quantise(torch.randn(96, 256, device="cuda"))
    values, x_scale = quantise(x)
    expected = (values.float() * x_scale) @ (weight.float() * scale).t()
    assert (product(x, weight, scale, True) - expected).norm() < 2**-7 * expected.norm()


def test_hidden_states_are_handed_on_without_a_wait_for_the_device():
    """As the stages of a pipeline do: what waits for the pass before would hold both hosts up."""
    rings = Rings(1, 3, 4, torch.zeros(8, device="cuda"), compile=False)
    hidden = torch.randn(2, 8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        rings.put([0, 2], [5, 9], hidden)
        taken = rings.take([2, 0], [9, 5])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(taken, hidden.flip(0))
