"""`EarlyExitModel` in the hands of somebody who knows transformers and PEFT."""

import json
from pathlib import Path

import pytest
import torch
from helpers.families import tiny
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from ee_tuning import EarlyExitModel, ExitConfig, UserError

IDS = torch.tensor([[5, 9, 11, 40]])


def exits(**settings):
    return EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,2", arch="mlp"), **settings)


def test_folders_may_be_paths(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    model = EarlyExitModel.from_base(Path(tmp_path / "base"), ExitConfig("2", arch="mlp"))
    model.save_pretrained(tmp_path / "exits")
    again = EarlyExitModel.from_pretrained(tmp_path / "exits", tmp_path / "base")
    assert again.exit_layers == [2]
    assert json.loads((tmp_path / "exits/exit_config.json").read_text())["base_model"] == str(
        tmp_path / "base"
    )


def test_a_new_card_takes_the_place_of_an_old_one_that_nobody_edited(tmp_path):
    model = exits()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "| 1 | mlp | own |" in card.read_text()
    other = EarlyExitModel.from_base(tiny("llama"), ExitConfig("3", arch="norm"))
    other.save_pretrained(tmp_path)
    assert "| 3 | norm | own |" in card.read_text()
    assert "mlp" not in card.read_text()
    for text in (card.read_text().replace("Early exits", "My exits"), "mine", ""):
        card.write_text(text)
        model.save_pretrained(tmp_path)
        assert card.read_text() == text


def test_a_card_names_a_backbone_of_the_hub_alone(tmp_path, monkeypatch):
    """The hub refuses a card whose base_model is no id of its own."""
    monkeypatch.chdir(tmp_path)
    tiny("llama").save_pretrained("some/base")
    for name, said in (("some/base", False), (f"{tmp_path}/some/base", False), ("a/b", True)):
        model = tiny("llama")
        model.name_or_path = name
        EarlyExitModel.from_base(model, ExitConfig("2")).save_pretrained("exits")
        card = Path("exits/README.md").read_text()
        assert (f"base_model: {name}" in card) is said
        assert f"# Early exits for `{name}`" in card


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\), .* \(1, 4\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "has 0 within a text"),
        ({"attention_mask": IDS, "position_ids": IDS}, "both attention_mask and position_ids"),
    ],
)
def test_masks_that_make_no_sense(given, message):
    with pytest.raises(UserError, match=message):
        exits()(IDS, **given)


@pytest.mark.parametrize("loading", [True, False])
@pytest.mark.parametrize("made", [True, False])  # the backbone, in the same mode
def test_calls_in_and_out_of_inference_mode_take_turns(tmp_path, loading, made):
    tiny("llama").save_pretrained(tmp_path / "base")
    exits().save_pretrained(tmp_path)
    with torch.inference_mode(loading):
        base = tiny("llama") if made else None
        model = EarlyExitModel.from_pretrained(tmp_path, base or tmp_path / "base")
    texts = []
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            texts.append(model.generate(IDS, max_new_tokens=6, do_sample=False).sequences)
    assert all(torch.equal(text, texts[0]) for text in texts)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.exits.parameters())


def test_a_generation_config_can_be_given_to_the_model():
    model = exits()
    model.generation_config = GenerationConfig(max_new_tokens=3)
    assert model.generate(IDS).sequences.shape == (1, 7)
    assert model.model.generation_config is model.generation_config


class Adapted(nn.Module):
    """As layers of PEFT's: a linear layer and what is added to it."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.low = linear, nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.low(x)


class PeftModel(nn.Module):
    def merge_and_unload(self):
        pass


def with_adapter():
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    return model


def spread():
    model = tiny("llama")
    model.hf_device_map = {"model.layers": "disk", "lm_head": "cpu"}
    return model


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (with_adapter, {}, "has an adapter of PEFT in its layers: .*merge_and_unload"),
        (PeftModel, {}, "not a PeftModel .*merge_and_unload"),
        (lambda: tiny("llama").config, {}, "or a causal LM of transformers, not a LlamaConfig"),
        (exits, {}, "not a EarlyExitModel"),
        (spread, {}, "spread over cpu, disk by its device_map"),
        (lambda: tiny("llama"), {"dtype": torch.bfloat16}, "is loaded in torch.float32, and dtype"),
        (lambda: tiny("llama"), {"dtype": "bfloat16"}, "is loaded in torch.float32, and dtype"),
        (lambda: tiny("llama"), {"backbone_precision": "int3"}, "unknown: use one of same, fp8"),
    ],
)
def test_backbones_in_memory_that_cannot_be_had(tmp_path, made, settings, message):
    model = made()
    with pytest.raises(UserError, match=message) as refusal:
        EarlyExitModel.from_base(model, ExitConfig("2"), **settings)
    assert "\n" not in str(refusal.value)
    exits().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        EarlyExitModel.from_pretrained(tmp_path, model, **settings)


def test_an_adapter_that_comes_later_is_refused_until_it_is_merged():
    """As what was decoded before, too, has copies of the weights."""
    model = exits()
    model.generate(IDS, mode="full", max_new_tokens=4)
    attention = model.model.model.layers[0].self_attn
    adapter = attention.q_proj = Adapted(attention.q_proj)
    with pytest.raises(UserError, match="has an adapter of PEFT in its layers"):
        model.generate(IDS, mode="full", max_new_tokens=4)
    with pytest.raises(UserError, match="has an adapter of PEFT in its layers"):
        model(IDS, labels=IDS)
    attention.q_proj = adapter.base_layer
    attention.q_proj.weight.data += 9 * adapter.low.weight.data
    out = model.generate(IDS, mode="full", max_new_tokens=9, eos_token_id=None).sequences
    expected = model.model.generate(IDS, do_sample=False, max_new_tokens=9, eos_token_id=None)
    assert torch.equal(out, expected)
    assert model(IDS, labels=IDS).loss.isfinite()


def test_the_dtype_that_a_loaded_backbone_has_may_be_named():
    for dtype in ("auto", "float32", torch.float32):
        assert exits(dtype=dtype).dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_backbone_is_recognised_in_fp16_whose_small_numbers_are_others(tmp_path, stored):
    base = tiny("llama").to(stored)
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(1e-3)  # much of it is subnormal in fp16
    base.save_pretrained(tmp_path / "base")
    folders = {"": tmp_path / "exits", "float16": tmp_path / "half"}
    config = ExitConfig("1,2", arch=["mlp", "layer"])
    EarlyExitModel.from_base(tmp_path / "base", config).save_pretrained(folders[""])
    half = EarlyExitModel.from_base(tmp_path / "base", config, dtype=torch.float16)
    half.save_pretrained(folders["float16"])
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float16)
    for folder in folders.values():
        assert EarlyExitModel.from_pretrained(folder).dtype == stored
        model = EarlyExitModel.from_pretrained(folder, dtype="float16")
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert model.config.dtype == torch.float16
        for ours, theirs in zip(model.model.parameters(), want.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    rounded = EarlyExitModel.from_base(tmp_path / "base", config).half()
    rounded.save_pretrained(tmp_path / "rounded")
    assert EarlyExitModel.from_pretrained(tmp_path / "rounded").dtype == stored
    kept = EarlyExitModel.from_pretrained(folders[""], dtype="float16", exit_dtype=torch.float32)
    assert {p.dtype for p in kept.exits.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bf61", "int8", torch.int8])
def test_what_is_no_dtype_of_models_is_refused(tmp_path, dtype):
    exits().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^dtype {dtype} is none for a model: use auto"):
        EarlyExitModel.from_pretrained(tmp_path, "nowhere", dtype=dtype)


@pytest.mark.parametrize("config", [{"layers": [1]}, [1], None])
def test_new_exits_are_told_by_a_config(config):
    with pytest.raises(UserError, match=r"told by an ExitConfig, not .*: give ExitConfig\(layers="):
        EarlyExitModel.from_base(tiny("llama"), config)


def test_a_device_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="device 'gpu' is unknown: give cpu, cuda"):
        EarlyExitModel.from_base(tiny("llama"), ExitConfig([1]), device="gpu")
    model = exits()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="device 'gpu' is unknown: give cpu, cuda"):
        EarlyExitModel.from_pretrained(tmp_path, model=model.model, device="gpu")
    cpu = EarlyExitModel.from_pretrained(tmp_path, model=model.model, device=torch.device("cpu"))
    assert cpu.device.type == "cpu"


def test_if_nothing_is_asked_for_there_are_logits_of_full_depth():
    model, ids = exits(), torch.tensor([[5, 9, 11]])
    with torch.no_grad():
        expected = model.model(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert model(ids, output_exit_logits=True).logits is None
    with_labels = model(ids, labels=ids)
    assert with_labels.logits is None
    assert with_labels.loss is not None
    assert torch.equal(model(ids, labels=ids, output_logits=True).logits, expected)


def test_labels_of_something_else_are_refused():
    with pytest.raises(UserError, match=r"shape \(1, 3\) are not of input_ids of shape \(1, 4\)"):
        exits()(torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 3, dtype=torch.int64))
