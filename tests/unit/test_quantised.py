"""A backbone kept by torchao or bitsandbytes: near the plain one, exits and fingerprint exact."""

import pytest
import torch
from helpers.families import tiny
from transformers import BitsAndBytesConfig, TorchAoConfig

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.cli import main
from ee_tuning.config import TuneConfig
from ee_tuning.errors import UserError
from ee_tuning.plan.check import check
from ee_tuning.quantise import packages as module
from ee_tuning.quantise.packages import PACKAGES, quantisation_config
from ee_tuning.tune.step import Tuner

EXITS = ExitConfig("1,3", "mlp,layer")
# Relative errors of hidden states after up to 3 layers. 8 bits with a scale per row round to 2⁻⁸ of
# the largest value of a row, about 1% of a normal one; nf4 is off by about an eighth each time.
NEAR = {"torchao-int8": 0.03, "bnb-8bit": 0.03, "bnb-4bit": 0.4}


@pytest.fixture(autouse=True)
def _installed(request):
    if "precision" in request.fixturenames:
        pytest.importorskip(PACKAGES[request.getfixturevalue("precision")])


def backbone(family, dtype):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    if family == "opt":
        sizes = {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}
    return tiny(family, **sizes).to(dtype)


def batch():
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(24).repeat(2, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("precision", PACKAGES)
def test_states_and_losses_are_near_and_exits_are_exact(precision, family, dtype):
    base = {name: backbone(family, dtype) for name in ("same", precision)}
    plain, kept = (
        EarlyExitModel.from_base(model, EXITS, backbone_precision=name)
        for name, model in base.items()
    )
    modules = [m for layer in kept.backbone.layers for m in layer.modules()]
    kinds = {type(m) for m in modules if isinstance(m, torch.nn.Linear)}
    names = {type(m.weight).__name__ for m in kept.backbone.layers[0].modules() if type(m) in kinds}
    assert names <= {"Int8Tensor", "AffineQuantizedTensor", "Int8Params", "Params4bit"}
    assert kept.tensor_hashes == plain.tensor_hashes
    a, b = plain.exit_state(), kept.exit_state()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(type(p) is torch.nn.Parameter for p in kept.exits.parameters())
    ids = batch()["input_ids"]
    descents = [model.chain.descend(ids) for model in (plain, kept)]
    for layer in plain.exit_layers:
        x, y = (descent.to(layer) for descent in descents)
        assert 0 < (x.hidden - y.hidden).norm() < NEAR[precision] * x.hidden.norm()
    losses = [Tuner(model, {}).mean_losses([batch()]) for model in (plain, kept)]
    for layer, loss in losses[0].items():
        assert losses[1][layer] == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("precision", PACKAGES)
def test_the_likeliest_tokens_are_decoded(precision):
    model = EarlyExitModel.from_base(
        backbone("llama", torch.float32), EXITS, backbone_precision=precision
    ).eval()
    wanted = ids = batch()["input_ids"][:1, :5]
    for _ in range(6):
        following = model(wanted, output_logits=True).logits[:, -1].argmax(-1)
        wanted = torch.cat([wanted, following[:, None]], 1)
    common = {"max_new_tokens": 6, "eos_token_id": None}
    for mode in ("full", "speculative", "full"):
        assert torch.equal(model.generate(ids, mode=mode, **common).sequences, wanted)


@pytest.mark.parametrize("precision", PACKAGES)
def test_settings_are_transformers_own(precision):
    kind = TorchAoConfig if precision.startswith("torchao") else BitsAndBytesConfig
    assert isinstance(quantisation_config(precision, torch.bfloat16), kind)


def test_layers_without_linear_matrices_are_refused():
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match="no linear matrices that could be kept in torchao-int8"):
        EarlyExitModel.from_base(tiny("gpt2"), EXITS, backbone_precision="torchao-int8")


@pytest.mark.parametrize("precision", ["torchao-int8", "bnb-4bit"])
def test_a_missing_package_is_named_before_anything_is_read(
    precision, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    config = TuneConfig(data=["a.jsonl"], layers="4", backbone_precision=precision)
    with pytest.raises(UserError, match=f"{precision} needs: pip install {PACKAGES[precision]}"):
        check(config)
    with pytest.raises(UserError, match="--log-to wandb needs: pip install wandb"):
        check(TuneConfig(data=["d"], layers="2", log_to="wandb"))
    with pytest.raises(UserError, match="--optimizer adamw-8bit needs: pip install torchao"):
        check(TuneConfig(data=["a.jsonl"], layers="4", optimizer="adamw-8bit"))
    flags = f"--model no/where --layers 1 --data nowhere.jsonl --out {tmp_path}/x"
    with pytest.raises(SystemExit) as stopped:
        main(["tune", *flags.split(), "--backbone-precision", precision])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
