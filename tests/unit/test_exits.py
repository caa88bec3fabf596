"""Exits: initialisation, independence, saving; backbones and their fingerprints; bad input."""

import json
import math
import shutil

import pytest
import torch
from helpers.families import tiny
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.exit_config import parse_layers, parse_threshold
from ee_tuning.loading import load_backbone
from ee_tuning.model import Network
from ee_tuning.share import Saved, Share, load, shapes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8,16", [8, 16]),
        ([4, 8], [4, 8]),
        ("1/8,2/8,1/1", [4, 8, 32]),
        ("every:8", [8, 16, 24, 32]),
        (["1/4", 12], [8, 12]),
    ],
)
def test_layers_can_be_given_in_many_ways(given, expected):
    assert parse_layers(given, 32) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0", "exit layer 0 does not exist"),
        ("33", "exit layer 33 does not exist"),
        ("8,8", "given twice"),
        ("1/4,8", "given twice"),
        ("x", "not understood"),
        ("1/0", "not understood"),
        (",", "not understood"),
        ("", "no exit layers"),
        ([], "no exit layers"),
        ("every:0", "'every:0' is not understood.* every:N with an N from 1 to 32$"),
        ("every:33", "'every:33' is not understood"),
        ("draft", r"'draft' is not understood: give numbers \(8,16\), fractions"),
    ],
)
def test_bad_layers(given, message):
    with pytest.raises(UserError, match=message):
        parse_layers(given, 32)


def test_where_a_draft_exit_may_be_its_number_is_told():
    with pytest.raises(UserError, match=r"give numbers \(8,16; a draft exit's is 0\)"):
        ExitConfig("draft", "draft").specs(32)
    with pytest.raises(UserError, match=r"8:0\.9,16:0\.7; a draft exit's is 0"):
        parse_threshold("draft:0.5")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "mpl"}, "use one of embedding, norm, mlp, layer"),
        ({"arch": ["mlp", "norm", "mlp"]}, "3 values of arch, exits: 2; give one, or one"),
        ({"head": "tied"}, "use one of own, shared"),
        ({"arch": None}, "arch None is unknown: use one of embedding"),
        ({"head": 3}, "head 3 is unknown: use one of own, shared"),
        ({"arch": [["mlp"]]}, r"arch \['mlp'\] is unknown"),
        ({"seed": "a"}, "seed 'a' is not possible: give a whole number"),
        ({"init": "zero"}, "copy or random"),
    ],
)
def test_bad_exit_config(kwargs, message):
    with pytest.raises(UserError, match=message):
        EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,2", **kwargs))


def test_random_initialisation_has_the_stated_deviations():
    """Tolerance: 5 % of the deviation, several standard errors for matrices of this size."""
    model = tiny(
        "llama", hidden_size=128, intermediate_size=256, vocab_size=512, num_hidden_layers=4
    )
    early_exit = EarlyExitModel.from_base(model, ExitConfig("3", arch="layer", init="random"))
    small = 0.02 / math.sqrt(2 * 3)
    for name, p in early_exit.exit_state().items():
        if "norm" in name:
            assert (p == 1).all()
            continue
        expected = small if "o_proj" in name or "down_proj" in name else 0.02
        assert p.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(p.mean().item()) < 0.001, name
    with_bias = EarlyExitModel.from_base(tiny("phi"), ExitConfig("3", arch="mlp", init="random"))
    assert all((p == 0).all() for n, p in with_bias.exit_state().items() if "bias" in n)


def test_random_initialisation_does_not_depend_on_the_other_exits():
    model = tiny("llama")
    both, alone = (
        EarlyExitModel.from_base(model, ExitConfig(layers, init="random", seed=3)).exit_state()
        for layers in ("1,3", "3")
    )
    assert all(torch.equal(both[name], p) for name, p in alone.items())


def test_shared_head_is_the_backbones_and_adds_nothing():
    model = tiny("llama")
    early_exit = EarlyExitModel.from_base(model, ExitConfig("1,2", arch="norm", head="own,shared"))
    assert set(early_exit.exit_state()) == {"1.head.weight", "1.norm.weight", "2.norm.weight"}
    logits = early_exit(torch.tensor([[4, 5, 6]]), output_exit_logits=True).exit_logits
    own = EarlyExitModel.from_base(model, ExitConfig("1,2", arch="norm"))
    expected = own(torch.tensor([[4, 5, 6]]), output_exit_logits=True).exit_logits
    assert torch.equal(logits[2], expected[2])


def test_exit_after_the_last_layer_sits_beside_the_final_exit():
    model = tiny("llama")
    early_exit = EarlyExitModel.from_base(model, ExitConfig("4", arch="norm"))
    out = early_exit(torch.tensor([[4, 5, 6]]), output_exit_logits=True, output_logits=True)
    assert torch.equal(out.exit_logits[4], out.logits)
    fixed = early_exit.generate(torch.tensor([[4, 5, 6]]), mode="fixed", max_new_tokens=5)
    full = early_exit.generate(torch.tensor([[4, 5, 6]]), mode="full", max_new_tokens=5)
    assert torch.equal(fixed.sequences, full.sequences)


def test_the_exits_gradients_do_not_reach_the_backbone_or_each_other():
    model = tiny("llama")
    early_exit = EarlyExitModel.from_base(model, ExitConfig("1,2", arch="mlp"))
    ids = torch.tensor([[4, 5, 6, 7]])
    early_exit(ids, labels=ids).exit_losses[2].backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is None for p in early_exit.exit(1).parameters())
    assert all(p.grad is not None for p in early_exit.exit(2).parameters())


@pytest.fixture
def saved(tmp_path):
    """A backbone and its exits on disk."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    early_exit = EarlyExitModel.from_base(
        str(tmp_path / "base"), ExitConfig("1,2", arch="mlp,layer")
    )
    early_exit.save_pretrained(tmp_path / "exits")
    return tmp_path


def test_saved_files(saved):
    assert sorted(p.name for p in (saved / "exits").iterdir()) == [
        "README.md",
        "exit_config.json",
        "exits.safetensors",
    ]
    config = json.loads((saved / "exits/exit_config.json").read_text())
    assert config["format_version"] == 1
    assert config["layers"] == [1, 2]
    assert config["arch"] == ["mlp", "layer"]
    assert config["base_model"] == str(saved / "base")
    assert "8.norm.weight" not in load_file(saved / "exits/exits.safetensors")
    assert "| 2 | layer | own |" in (saved / "exits/README.md").read_text()


def test_backbone_is_looked_up_or_given(saved):
    ids = torch.tensor([[4, 5, 6]])
    results = [
        EarlyExitModel.from_pretrained(str(saved / "exits"), model=model, whole=whole)
        for model in (None, str(saved / "base"), load_backbone(str(saved / "base")))
        for whole in (True, False)
    ]
    logits = [m(ids, output_exit_logits=True).exit_logits[2] for m in results]
    assert all(torch.equal(x, logits[0]) for x in logits)
    low = EarlyExitModel.from_pretrained(str(saved / "exits"), dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_moving_the_model_moves_backbone_and_exits(saved):
    ids = torch.tensor([[4, 5, 6]])
    model = EarlyExitModel.from_pretrained(str(saved / "exits"))
    expected = model(ids, output_exit_logits=True, output_logits=True)
    double = model.to(torch.float64)(ids, output_exit_logits=True, output_logits=True)
    assert double.logits.dtype == double.exit_logits[1].dtype == torch.float64
    assert double.exit_logits[2].dtype == torch.float64
    torch.testing.assert_close(double.logits.float(), expected.logits, rtol=1e-4, atol=1e-5)


def test_another_backbone_is_refused(saved):
    exits = str(saved / "exits")
    with pytest.raises(UserError, match="hidden_size is 64 here and 32 there"):
        EarlyExitModel.from_pretrained(exits, model=tiny("llama", hidden_size=64))
    with pytest.raises(UserError, match="model_type is 'qwen2' here and 'llama' there"):
        EarlyExitModel.from_pretrained(exits, model=tiny("qwen2"))
    with pytest.raises(UserError, match="made for another backbone: embedding"):
        EarlyExitModel.from_pretrained(exits, model=tiny("llama", seed=1))
    headed = tiny("llama")
    headed.lm_head.weight.data *= 1.5
    with pytest.raises(UserError, match="made for another backbone: head"):
        EarlyExitModel.from_pretrained(exits, model=headed)
    changed = tiny("llama")
    changed.model.layers[1].mlp.up_proj.weight.data *= 1.5
    with pytest.raises(UserError, match="made for another backbone: layer 2"):
        EarlyExitModel.from_pretrained(exits, model=changed)


def test_a_backbone_with_too_few_layers_is_another_one(saved):
    """Told before the exits' layers are looked for in it, as tune and export do at first."""
    tiny("llama", num_hidden_layers=1).save_pretrained(saved / "shallow")
    source = Saved(str(saved / "exits"), str(saved / "shallow"))
    for look in (shapes, lambda source: load(source, Share(whole=False), Network)):
        with pytest.raises(UserError, match="made for another backbone: num_hidden_layers is 1"):
            look(source)


def test_hub_round_trip_against_a_local_folder(saved, monkeypatch):
    """push_to_hub and loading by id, with the hub's two calls served from a folder."""
    from ee_tuning import adapter, api

    hub = saved / "hub"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            class Url(str):
                pass

            url = Url(f"https://hub/{repo_id}")
            url.repo_id = repo_id
            return url

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, hub / repo_id)

    monkeypatch.setattr(api, "HfApi", Api)
    monkeypatch.setattr(adapter, "check_there", lambda *_: None)
    monkeypatch.setattr(adapter, "snapshot_download", lambda repo_id, **_: str(hub / repo_id))
    model = EarlyExitModel.from_pretrained(str(saved / "exits"))
    assert model.push_to_hub("me/exits") == "https://hub/me/exits"
    again = EarlyExitModel.from_pretrained("me/exits")
    assert all(torch.equal(v, again.exit_state()[k]) for k, v in model.exit_state().items())


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _with(**values):
    """Damage to a JSON file: other values in it."""
    return lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | values))


BAD_FILES = [
    ("base/model.safetensors", _truncate, "cannot load the backbone"),
    (
        "base/model.safetensors",
        lambda p: p.write_bytes(b"nonsense" * 40),
        "cannot load the backbone",
    ),
    ("base/model.safetensors", lambda p: p.unlink(), "cannot load the backbone"),
    ("base/config.json", lambda p: p.unlink(), "has no config.json"),
    ("base/config.json", lambda p: p.write_text("{"), r"config\.json is not valid JSON"),
    ("base/config.json", lambda p: p.write_text("null"), "it holds None, no JSON object"),
    ("base/generation_config.json", lambda p: p.write_text("[]"), r"it holds \[\], no JSON"),
    ("base/generation_config.json", lambda p: p.write_text('{"eos'), "is not valid JSON"),
    ("exits/exits.safetensors", _truncate, "is damaged"),
    ("exits/exits.safetensors", lambda p: p.unlink(), "does not exist"),
    ("exits/exit_config.json", lambda p: p.write_text("{"), "mend it, or copy it again"),
    ("exits/exit_config.json", lambda p: p.write_text("[]"), r"it holds \[\], no JSON object"),
    ("exits/exit_config.json", lambda p: p.write_text('{"format_version": 1}'), "lacks arch, back"),
    ("exits/exit_config.json", lambda p: p.unlink(), "holds no exits"),
    *(
        ("exits/exit_config.json", _with(**{name: value}), message)
        for name, value, message in [
            ("format_version", "1", "format_version is '1', it must be of type int"),
            ("layers", None, r"layers is None, it must be of type list\[int\]"),
            ("layers", [1.5], r"layers is \[1\.5\], it must be of type list\[int\]"),
            ("layers", [], "must have an entry per exit"),
            ("arch", "mlp", r"arch is 'mlp', it must be of type list\[str\]"),
            ("head", True, r"head is True, it must be of type list\[str\]"),
            ("seed", True, "seed is True, it must be of type int"),
            ("base_model", -1, "base_model is -1, it must be of type str"),
            ("sources", 3, r"sources is 3, it must be of type list\[int\] \| None"),
            ("vocab_size", "x", r"vocab_size is 'x', it must be of type int \| None"),
            ("backbone", {}, "backbone is damaged: it lacks config, tensors"),
            ("backbone", {"config": [], "tensors": {}}, r"config is \[\], it must be of type dict"),
            ("backbone", {"config": {}, "tensors": {}}, r"backbone\.config is damaged: it lacks"),
        ]
    ),
]


@pytest.mark.parametrize(("name", "damage", "message"), BAD_FILES)
def test_damaged_files(saved, name, damage, message):
    damage(saved / name)
    with pytest.raises(UserError, match=message):
        EarlyExitModel.from_pretrained(str(saved / "exits"))


def test_a_tensor_missing_from_the_backbone(saved):
    from safetensors.torch import save_file

    path = saved / "base/model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        EarlyExitModel.from_pretrained(str(saved / "exits"))


def test_backbones_that_are_quantised_already(tmp_path):
    """Stored so, whether or not the package that made them is there, or loaded so."""
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"quantization_config": {"quant_method": "gptq"}}))
    message = r"is quantised \(gptq\).*--backbone-precision bnb-4bit"
    with pytest.raises(UserError, match=message):
        EarlyExitModel.from_base(str(tmp_path), ExitConfig("1"))
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(UserError, match=r"LlamaForCausalLM is quantised \(bitsandbytes\)"):
        EarlyExitModel.from_base(model, ExitConfig("1"))


def test_a_backbone_that_is_gone_is_asked_for(saved):
    shutil.rmtree(saved / "base")
    with pytest.raises(UserError, match=r"there is no such folder.*say where it is with --model"):
        EarlyExitModel.from_pretrained(str(saved / "exits"))


def test_models_that_are_not_decoder_only(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50}
    bert = BertForMaskedLM(BertConfig(**small, intermediate_size=16))
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, vocab_size=50)
    )
    for model, message in ((bert, "not a causal LM"), (t5, "encoder-decoder")):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            EarlyExitModel.from_base(str(folder), ExitConfig("1"))
        with pytest.raises(UserError):
            EarlyExitModel.from_base(model, ExitConfig("1"))


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "no/such/path", "nowhere"])
def test_exits_that_are_not_there(path):
    with pytest.raises(UserError, match=f"cannot read the exits {path}: there is no such folder"):
        EarlyExitModel.from_pretrained(path)
