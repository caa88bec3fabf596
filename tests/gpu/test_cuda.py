"""The same code on a GPU in bf16: runs where there is one, and is skipped elsewhere."""

import pytest
import torch
from families import tiny

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.config import TuneConfig
from ee_tuning.tune.optimizer import build_optimizers
from ee_tuning.tune.step import Objective, mean_losses, tuning_step

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
    first = mean_losses(model, [batch()], torch.bfloat16)
    for _ in range(10):
        weights = dict.fromkeys(model.exit_layers, 1.0)
        tuning_step(model, optimizers, [batch()], Objective("mixed"), weights, 1.0, torch.bfloat16)
    last = mean_losses(model, [batch()], torch.bfloat16)
    assert all(last[layer] < first[layer] for layer in (1, 3))
    assert all(torch.equal(v, model.model.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_depth_is_transformers_generate_and_exits_leave(dtype):
    base = tiny("llama").to("cuda", dtype)
    model = EarlyExitModel.from_base(base, ExitConfig("1,2,3", "mlp,norm,layer"))
    ids = torch.tensor([[5, 9, 11]], device="cuda")
    expected = base.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(ids, mode="full", max_new_tokens=20).sequences, expected)
    out = model.generate(ids, threshold=0.0, max_new_tokens=20, eos_token_id=None)
    assert set(out.exit_layers[0].tolist()) == {1, 4}
