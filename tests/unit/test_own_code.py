"""Code that comes with a checkpoint runs where the user allows it, and nowhere else."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from helpers.commands import arguments, fails, tune

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.cli import main

MODEL_CODE = """\
import os
from transformers import LlamaConfig, LlamaForCausalLM
open(os.environ["RAN"], "a").write("model\\n")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER_CODE = """\
import os
from transformers import PreTrainedTokenizerFast
open(os.environ["RAN"], "a").write("tokenizer\\n")
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """What ran, one word each; the terminal would answer any question with yes."""
    path = tmp_path / "ran"
    monkeypatch.setenv("RAN", str(path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    return lambda: path.read_text().split() if path.exists() else []


@pytest.fixture
def model(base, tmp_path):
    """A folder whose model is in code of its own, and the tokenizer is not."""
    folder = tmp_path / "own-model"
    shutil.copytree(base, folder)
    (folder / "own.py").write_text(MODEL_CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change(
        folder / "config.json", model_type="own", auto_map=auto_map,
        architectures=["OwnForCausalLM"],
    )  # fmt: skip
    return str(folder)


@pytest.fixture
def tokenizer_folder(base, tmp_path):
    """A folder with a tokenizer in code of its own."""
    folder = tmp_path / "own-tokenizer"
    folder.mkdir()
    for file in Path(base).glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "words.py").write_text(TOKENIZER_CODE)
    auto_map = {"AutoTokenizer": ["words.OwnTokenizer", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    return str(folder)


def test_a_models_own_code_is_refused_in_a_line(model, data, tmp_path, ran, capsys):
    out = ["--out", tmp_path / "out"]
    for command in (
        ["inspect", model],
        ["init", "--model", model, "--layers", "1", *out],
        ["tune", *arguments(model, data, tmp_path / "out")],
        ["plan", "--model", model, "--layers", "1"],
    ):
        line = fails(capsys, *command)
        assert f"{model} cannot be read without running code that comes with it (own.py)" in line
        assert line.endswith("allow it with --trust-remote-code")
    with pytest.raises(UserError, match="trust-remote-code"):
        EarlyExitModel.from_base(model, ExitConfig([1]))
    assert ran() == []


def test_allowed_code_runs_and_is_said_and_kept(model, data, base, tmp_path, ran, capsys):
    said = f"code that comes with {model} is run, as --trust-remote-code says: own.py"
    with pytest.warns(UserWarning, match="is run, as --trust") as warned:
        tune(model, data, tmp_path / "out", trust_remote_code=True, steps=4)
    assert [str(warning.message) for warning in warned] == [said]
    assert set(ran()) == {"model"}
    assert yaml.safe_load((tmp_path / "out/run.yaml").read_text())["trust_remote_code"] is True
    shutil.rmtree(tmp_path / "out/checkpoints/step-000004")
    with pytest.warns(UserWarning, match=said):
        main(["tune", "--out", str(tmp_path / "out"), "--resume"])
    capsys.readouterr()
    exits = ["--exits", str(tmp_path / "out")]
    line = fails(capsys, "generate", *exits, "--prompt", "x")
    assert "allow it with --trust-remote-code" in line
    allowed = "--trust-remote-code"
    with pytest.warns(UserWarning, match=said):
        main(["generate", *exits, "--prompt", "x", "--max-new-tokens", "2", allowed])
    with pytest.warns(UserWarning, match=said):
        main(["inspect", model, allowed])
    for what in (["--layer", "1"], ["--merge"]):
        with pytest.warns(UserWarning, match=said):  # refused, and told what was run all the same
            line = fails(capsys, "export", *exits, *what, "--out", tmp_path / "new", allowed)
        assert f"OwnForCausalLM is code that came with {model}" in line
    with pytest.warns(UserWarning, match=said):
        loaded = EarlyExitModel.from_pretrained(exits[1], trust_remote_code=True, whole=False)
    assert type(loaded.model).__name__ == "OwnForCausalLM"


def test_a_tokenizers_own_code(tokenizer_folder, base, data, tmp_path, ran, capsys):
    flags = {"tokenizer": tokenizer_folder, "steps": 2}
    line = fails(capsys, "tune", *arguments(base, data, tmp_path / "out", **flags))
    assert f"{tokenizer_folder} cannot be read without running code" in line
    assert "(words.py)" in line
    assert ran() == []
    with pytest.warns(UserWarning, match=f"code that comes with {tokenizer_folder} is run"):
        tune(base, data, tmp_path / "allowed", **flags, trust_remote_code=True)
    assert ran() == ["tokenizer"]


def test_code_beside_a_model_that_transformers_knows_is_left_alone(base, data, tmp_path, ran):
    """As many checkpoints have it that are older than their family's support."""
    folder = tmp_path / "both"
    shutil.copytree(base, folder)
    (folder / "own.py").write_text(MODEL_CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change(folder / "config.json", auto_map=auto_map)
    (folder / "words.py").write_text(TOKENIZER_CODE)
    change(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["words.OwnTokenizer", None]}
    )
    tune(str(folder), data, tmp_path / "out", steps=2)
    main(["generate", "--exits", str(tmp_path / "out"), "--prompt", "x", "--max-new-tokens", "2"])
    assert ran() == []


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_the_hub_are_code_too(base, tmp_path, key):
    folder = tmp_path / "kernel"
    shutil.copytree(base, folder)
    change(folder / "config.json", **{key: "someone/attention"})
    with pytest.raises(UserError, match=r"code from the hub \(someone/attention\)"):
        EarlyExitModel.from_base(str(folder), ExitConfig([1]))
