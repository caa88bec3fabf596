"""The start of exits that are fitted to the backbone, against least squares row by row."""

import pytest
import torch
from helpers.families import tiny

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.config import TuneConfig
from ee_tuning.losses import IGNORED
from ee_tuning.tune.fitted import fit, fitted_to, scale_norm, tokens_to_fit
from ee_tuning.tune.step import Tuner

ARCHS = ["embedding", "norm", "mlp", "layer"]
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 4]])


def batches(number=12):
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 96, (number, 2, 8), generator=draw)
    labels = ids.masked_fill(POSITIONS == 0, IGNORED)
    labels[:, 1, 5] = IGNORED
    return [
        {"input_ids": a, "labels": b, "position_ids": POSITIONS}
        for a, b in zip(ids, labels, strict=True)
    ]


def rows(model, layer):
    """(R, H) features of the exit and of the final exit where a label follows, in fp64."""
    read, wanted = [], []
    for batch in batches():
        given = batch["input_ids"], batch["position_ids"]
        descent = model.chain.descend(*given)
        with torch.no_grad():
            features = model.exit(layer).features(descent.to(layer))
            final = model.backbone.norm(descent.ahead(model.backbone.num_layers))
        for row in range(2):
            for place in range(7):
                if batch["labels"][row, place + 1] != IGNORED:
                    read.append(features[row, place])
                    wanted.append(final[row, place])
    return torch.stack(read).double(), torch.stack(wanted).double()


def weighted(model, layer):
    """The same, each token's divided by the size of its features."""
    x, y = rows(model, layer)
    size = x.square().mean(-1, keepdim=True).sqrt()
    return x / size, y / size


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi"])
def test_an_own_head_takes_the_map_of_least_squares(family, arch):
    """Tolerance: products in fp32."""
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("2", arch))
    x, y = weighted(model, 2)
    head = model.exit(2).head.weight.detach().double()
    fit(Tuner(model, {}), batches())
    x = torch.cat([x, torch.diag((1e-3 * x.square().sum(0)).sqrt())])
    y = torch.cat([y, torch.zeros(x.shape[1], y.shape[1])])
    expected = head @ torch.linalg.lstsq(x, y).solution.T
    found = model.exit(2).head.weight.detach().double()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("arch", ["norm", "mlp", "layer"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_with_a_shared_head_the_norm_takes_factors(family, arch):
    """Each the least-squares one of its value, without the bias; nothing else changes."""
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("2", arch, head="shared"))
    with torch.no_grad():
        if family == "gpt2":
            model.exit(2).norm.bias.normal_()
    bias = model.exit(2).norm.bias.double() if family == "gpt2" else 0
    before = {name: p.clone() for name, p in model.exit_state().items()}
    x, y = rows(model, 2)
    size = (x - bias).square().mean(-1, keepdim=True).sqrt()
    a, b = (x - bias) / size, (y - bias) / size
    factors = (a * b).sum(0) / (a * a).sum(0)
    fit(Tuner(model, {}), batches())
    found = rows(model, 2)[0]
    torch.testing.assert_close(found - bias, (x - bias) * factors, rtol=1e-3, atol=1e-4)
    changed = {n for n, p in model.exit_state().items() if not torch.equal(p, before[n])}
    assert changed == {"2.norm.weight"}


def test_a_norm_without_weights_stays_as_it_is():
    scale_norm(torch.nn.LayerNorm(8, elementwise_affine=False), torch.ones(8))


@pytest.mark.parametrize("known", [None, torch.arange(3, 70)])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_fitted_start_is_better_than_a_copied_one(arch, known):
    """Nearer to the final exit, where that is far: the last layers change all."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1", arch))
    with torch.no_grad():
        for layer in model.backbone.layers[1:]:
            for p in layer.parameters():
                p.mul_(3 if p.dim() > 1 else 1)
    if known is not None:
        model.reduce_vocabulary(known)

    @torch.no_grad()
    def distance():
        total = 0.0
        for batch in batches():
            out = model(**batch, output_exit_logits=True, output_logits=True)
            p, q = out.logits.softmax(-1), out.exit_logits[1].softmax(-1)
            total += float((p - q).abs()[..., slice(None) if known is None else known].sum())
        return total

    copied = distance()
    fit(Tuner(model, {}), batches())
    assert distance() < 0.9 * copied


def test_fitting_one_exit_does_not_depend_on_the_others():
    """Bit for bit, a draft among them."""
    config = ExitConfig("0,1,3", "draft,mlp,layer")
    together = EarlyExitModel.from_base(tiny("llama"), config)
    fit(Tuner(together, {}), batches())
    for one in (ExitConfig("1", "mlp"), ExitConfig("3", "layer"), ExitConfig("", "draft")):
        alone = EarlyExitModel.from_base(tiny("llama"), one)
        fit(Tuner(alone, {}), batches())
        for name, p in alone.exit_state().items():
            assert torch.equal(together.exit_state()[name], p), name


def test_an_architecture_may_stay_as_it_is():
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("0,1,3", "draft,norm,layer"))
    before = {name: p.clone() for name, p in model.exit_state().items()}
    fit(Tuner(model, {}), batches(), but="layer")
    changed = {n for n, p in model.exit_state().items() if not torch.equal(p, before[n])}
    assert changed == {"0.first.weight", "0.later.weight", "1.head.weight"}


def test_tokens_are_no_more_than_the_maps_need():
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1"))
    assert tokens_to_fit(model) == 100 * 32
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("", "draft", sources="1,4"))
    assert tokens_to_fit(model) == 100 * 3 * 32


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({}, "copy"),
        ({"loss": "kl"}, "fitted"),
        ({"loss": "kl", "arch": "layer"}, "copy"),
        ({"loss": "kl", "arch": "layer,norm"}, "fitted"),
        ({"loss": "kl", "arch": "layer", "init": "fitted"}, "fitted"),
        ({"loss": "kl", "init": "random"}, "random"),
        ({"init": "fitted"}, "fitted"),
        ({"arch": "draft"}, "fitted"),
        ({"arch": ["draft", "mlp"], "shard_backbone": True}, "copy"),
        ({"arch": "eagle3", "loss": "acceptance"}, "copy"),
        ({"loss": "acceptance", "tp": 2}, "fitted"),
    ],
)
def test_by_default_exits_are_fitted_where_the_final_exit_runs(settings, start):
    config = TuneConfig(**settings)
    assert config.start == config.exit_config().init == start
    assert config.runs_whole == (config.loss != "ce" or start == "fitted")


@pytest.mark.parametrize(("layers", "arch", "reads"), [("2", "norm", 1), ("0", "draft", 5)])
def test_a_fit_to_few_tokens_is_said(layers, arch, reads):
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig(layers, arch))
    values = reads * model.config.hidden_size
    assert fitted_to(model, 4 * values, 2.0).endswith("in closed form, 2 s")
    assert f"few for maps of {values:,} values" in fitted_to(model, 4 * values - 1, 2.0)
