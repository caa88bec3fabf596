"""Folders that are named as a backbone and are none: what they are instead, and what to do."""

import json
import shutil

import pytest
import torch
from helpers.data import make_tokenizer
from safetensors.torch import load_file

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.commands.inspect import inspect
from ee_tuning.config import InspectConfig
from ee_tuning.loading import load_tokenizer


@pytest.fixture
def folder(base, tmp_path):
    """A copy of a backbone, to spoil."""
    return shutil.copytree(base, tmp_path / "model")


def pickled(folder):
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def adapter_of_peft(folder):
    (folder / "config.json").unlink()
    settings = {"base_model_name_or_path": "some/base", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def saved_exits(folder):
    EarlyExitModel.from_base(str(folder), ExitConfig("2")).save_pretrained(folder)
    (folder / "config.json").unlink()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickled, r"weights in pytorch_model.bin, but only .*from_pretrained\('.*'\).save_pret"),
        (without_weights, "it has no weights, no model.safetensors"),
        (adapter_of_peft, "an adapter of PEFT for some/base: name that with --model, or .*merge"),
        (saved_exits, "holds exits, no backbone: name theirs, .*, with --model, or these"),
    ],
)
def test_what_is_no_backbone(folder, spoil, message, whole):
    spoil(folder)
    with pytest.raises(UserError, match=message) as refusal:
        EarlyExitModel.from_base(str(folder), ExitConfig("2"), whole=whole)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("what", ["backbone", "exits", "tokenizer", "backbone or exits"])
def test_a_file_is_not_its_folder(folder, what):
    exits = folder / "exits"
    EarlyExitModel.from_base(str(folder), ExitConfig("2")).save_pretrained(exits)
    file = exits / "exits.safetensors" if what == "exits" else folder / "config.json"
    ask = {
        "backbone": lambda: EarlyExitModel.from_base(str(file), ExitConfig("2")),
        "exits": lambda: EarlyExitModel.from_pretrained(str(file)),
        "tokenizer": lambda: load_tokenizer(str(file)),
        "backbone or exits": lambda: inspect(InspectConfig(path=str(file))),
    }[what]
    with pytest.raises(UserError, match=f"read the {what} .*: it is a file, give its folder, .*"):
        ask()


def test_a_file_of_no_checkpoint_has_no_folder_to_give(tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"it is a file, give a folder with a config\.json"):
        inspect(InspectConfig(path=str(tmp_path / "chats.jsonl")))


def test_pickled_weights_written_once_more_as_the_line_says(folder, tmp_path):
    pickled(folder)
    with pytest.raises(UserError) as refusal:
        EarlyExitModel.from_base(str(folder), ExitConfig("2"))
    advice = str(refusal.value).split("with ")[-1].replace("FOLDER", repr(str(tmp_path / "new")))
    exec(f"from transformers import AutoModelForCausalLM\n{advice}")
    new = EarlyExitModel.from_base(str(tmp_path / "new"), ExitConfig("2"))
    assert new.backbone.num_layers == 4


def test_a_folder_without_a_tokenizer(tmp_path):
    why = "it has no tokenizer.json that can be read; save the model's own there"
    with pytest.raises(UserError, match=f"^no tokenizer in {tmp_path}: {why}$"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["null", "[]", "{"])
def test_a_damaged_tokenizer(tmp_path, name, text):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"no tokenizer in {tmp_path}: ") as refusal:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(refusal.value)
