"""An exported exit is an ordinary checkpoint with the exit's own logits, in every family."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import families
from helpers.commands import read_all
from helpers.families import tiny
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.adapter import read_calibration
from ee_tuning.certificate import Certificate
from ee_tuning.cli import main
from ee_tuning.errors import UserError
from ee_tuning.export import exit_checkpoint
from ee_tuning.files import write_json
from ee_tuning.fingerprint import backbone_hashes, exit_hash

TOKENIZER = Path(__file__).parents[2] / "demo" / "model"
IDS = torch.tensor([[5, 9, 11, 3, 40, 7]])


def with_exits(family, arch, head="own"):
    """A tiny model with an exit at 2 whose weights are not the backbone's."""
    model = EarlyExitModel.from_base(tiny(family), ExitConfig([2], arch, head=head))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.exits.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("head", ["own", "shared"])
@pytest.mark.parametrize("arch", ["norm", "mlp", "layer"])
@pytest.mark.parametrize("family", [*families.FAMILIES, *families.MOE])
def test_logits_are_the_exits(family, arch, head, tmp_path):
    if arch == "mlp" and family in families.MOE:
        pytest.skip("a mixture of experts takes no mlp exit")
    model = with_exits(family, arch, head)
    exit_checkpoint(model, 2).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model.backbone.model)
    assert loaded.config.num_hidden_layers == (3 if arch == "layer" else 2)
    expected = model(IDS, output_exit_logits=True).exit_logits[2]
    assert torch.equal(loaded.eval()(IDS).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon", "mixtral"])
def test_an_exported_layer_exit_generates_before_it_is_saved(family, tmp_path):
    model = with_exits(family, "layer", "own")
    exported = exit_checkpoint(model, 2)
    common = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    found = exported.generate(IDS, **common)
    exported.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(found, loaded.generate(IDS, **common))
    full = model.generate(IDS, mode="full", **common).sequences
    assert torch.equal(full, model.model.generate(IDS, **common))  # nothing of it was renumbered


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("gpt2", families.GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
        ("diffllama", families.COMMON),
    ],
)
def test_layers_that_depend_on_their_number_are_refused(family, values, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, family, (family, values))
    with pytest.raises(UserError, match="by its number"):
        exit_checkpoint(with_exits(family, "layer"), 2)
    exit_checkpoint(with_exits(family, "norm"), 2)


@pytest.fixture
def saved(tmp_path):
    """A backbone with a tokenizer and exits at 1 (embedding) and 2 (mlp), on disk."""
    base = tmp_path / "base"
    tiny("llama", vocab_size=4096).save_pretrained(base)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(base)
    model = EarlyExitModel.from_base(str(base), ExitConfig([1, 2], ["embedding", "mlp"]))
    model.save_pretrained(tmp_path / "exits")
    return tmp_path


def export(saved, *args):
    main(["export", "--exits", str(saved / "exits"), "--out", str(saved / "out"), *args])


def test_a_draft_leaves_assisted_generation_as_it_is(saved):
    export(saved, "--layer", "2")
    base = AutoModelForCausalLM.from_pretrained(saved / "base").eval()
    draft = AutoModelForCausalLM.from_pretrained(saved / "out").eval()
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = base.generate(IDS, **options)
    assert torch.equal(base.generate(IDS, assistant_model=draft, **options), expected)
    assert AutoTokenizer.from_pretrained(saved / "out").vocab_size
    assert {path.name for path in (saved / "out").iterdir()} >= {"config.json", "README.md"}
    assert not [path for path in (saved / "out").iterdir() if path.is_dir()]


def test_a_merged_folder_needs_nothing_else(saved, capsys):
    stored = load_file(saved / "exits/exits.safetensors")
    stored = {name: value.double() for name, value in stored.items()}
    save_file(stored, saved / "exits/exits.safetensors")
    model = EarlyExitModel.from_pretrained(str(saved / "exits"))
    certificate = Certificate(
        thresholds=dict.fromkeys(model.exit_layers, 0.5), risk="next-token", epsilon=0.1, delta=0.1,
        n=10, p=0.01, test="betting", tested=0.0, report={}, dtype="float32",
        measure="probability", exits={k: exit_hash(model.exit(k)) for k in model.exit_layers},
        max_pending=8, max_new_tokens=20, backbone=backbone_hashes(model.backbone), data="",
    )  # fmt: skip
    write_json(saved / "exits/calibration.json", certificate.to_json())
    export(saved, "--merge")
    assert read_calibration(saved / "out") == certificate
    kept = load_file(saved / "out/exits.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in stored.items())  # every digit
    assert "The backbone is in here, too" in (saved / "out/README.md").read_text()
    expected = EarlyExitModel.from_pretrained(str(saved / "exits"))(IDS, output_exit_logits=True)
    base = tiny("llama", vocab_size=4096).state_dict()
    shutil.rmtree(saved / "base")
    moved = (saved / "out").rename(saved / "moved")
    plain = AutoModelForCausalLM.from_pretrained(moved).state_dict()
    assert plain.keys() == base.keys()
    assert all(torch.equal(value, base[name]) for name, value in plain.items())
    logits = EarlyExitModel.from_pretrained(str(moved))(IDS, output_exit_logits=True).exit_logits
    assert all(torch.equal(logits[k], v) for k, v in expected.exit_logits.items())
    main(["generate", "--exits", str(moved), "--prompt", "a", "--max-new-tokens", "2"])
    main(["generate", "--exits", str(moved), "--prompt", "a", "--calibrated"])  # without a warning
    main(["inspect", str(moved)])
    assert "for the backbone beside them (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give one of --layer"),
        (["--layer", "2", "--merge"], "give one of --layer"),
        (["--eagle3", "sglang", "--merge"], "give one of --layer"),
        (["--layer", "3"], "there is no exit at layer 3"),
        (["--layer", "1/2"], "layer is '1/2': give the number of one exit's layer"),
        (
            ["--layer", "draft"],
            "layer is 'draft': a draft exit sits at no layer; one of arch eagle3",
        ),
        (["--layer", "0"], "layer is 0: a draft exit sits at no layer"),
        (["--layer", "1"], "embedding exit"),
        (["--layer", "2", "--out", "BASE"], "is what is being exported"),
    ],
)
def test_mistakes_are_one_line(saved, capsys, args, message):
    args = [str(saved / "base") if arg == "BASE" else arg for arg in args]
    with pytest.raises(SystemExit) as stop:
        export(saved, *args)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert message in error
    assert "\n" not in error


def test_a_taken_folder_is_kept(saved, capsys):
    (saved / "out").mkdir()
    (saved / "out" / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit):
        export(saved, "--layer", "2")
    assert "--overwrite" in capsys.readouterr().err
    assert (saved / "out" / "mine.txt").read_text() == "keep"


def test_a_full_disk_is_one_line_and_nothing_half_written(saved, capsys, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(SystemExit) as stop:
        export(saved, "--layer", "2")
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert "No space left" in error
    assert "\n" not in error
    assert not (saved / "out").exists()


def test_overwriting_leaves_nothing_of_an_earlier_export(saved):
    export(saved, "--merge")
    names = {path.name for path in (saved / "out").iterdir()}
    assert names >= {"exits.safetensors", "exit_config.json", "model.safetensors"}
    export(saved, "--layer", "2", "--overwrite")
    left = {path.name for path in (saved / "out").iterdir()}
    assert left == names - {"exits.safetensors", "exit_config.json"}
    assert AutoModelForCausalLM.from_pretrained(saved / "out").config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "export/mine.txt"])
def test_what_is_not_ours_survives_an_overwriting_export(saved, capsys, name):
    export(saved, "--merge")
    mine = saved / "out" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("keep")
    before = read_all(saved / "out")
    with pytest.raises(SystemExit):
        export(saved, "--layer", "2", "--overwrite")
    assert f"did not write, or what was changed since: {name.split('/')[0]};" in (
        capsys.readouterr().err
    )
    assert read_all(saved / "out") == before


def test_weights_tuned_in_place_survive_an_overwriting_export(saved, capsys):
    export(saved, "--layer", "2")
    path = saved / "out/model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 1
    save_file(weights, path)
    before = read_all(saved / "out")
    with pytest.raises(SystemExit):
        export(saved, "--layer", "2", "--overwrite")
    assert "changed since: model.safetensors;" in capsys.readouterr().err
    assert read_all(saved / "out") == before


def test_what_fails_leaves_the_earlier_export(saved, capsys, monkeypatch):
    """A mistake, and a disk that is full in the middle of writing."""
    export(saved, "--layer", "2")
    before = read_all(saved / "out")
    for args in (["--layer", "3"], ["--layer", "2", "--model", "/nowhere"]):
        with pytest.raises(SystemExit):
            export(saved, *args, "--overwrite")
        assert read_all(saved / "out") == before

    def full(model, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(SystemExit):
        export(saved, "--layer", "2", "--overwrite")
    assert "No space left" in capsys.readouterr().err
    assert read_all(saved / "out") == before


@pytest.mark.parametrize("what", [["--layer", "2"], ["--merge"]])
def test_what_cannot_be_read_back_is_not_exported(saved, capsys, monkeypatch, what):
    """As when transformers saves an adapter and leaves the model out, or saves other values."""
    save_pretrained = PreTrainedModel.save_pretrained

    def adapter_alone(model, folder, **_):
        model.config.save_pretrained(folder)
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"")

    def spoiled(model, folder, **_):
        save_pretrained(model, folder)
        path = Path(folder) / "model.safetensors"
        weights = load_file(path)
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
        save_file(weights, path, metadata={"format": "pt"})

    for broken, message in (
        (adapter_alone, "cannot load the backbone"),
        (spoiled, "model.layers.1.mlp.up_proj.weight is another one when it is read back"),
    ):
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", broken)
        with pytest.raises(SystemExit):
            export(saved, *what)
        captured = capsys.readouterr()
        assert message in captured.err
        assert "saved in" not in captured.out
        assert not (saved / "out").exists()


def test_a_backbone_beside_an_adapter_of_peft_is_refused(saved, capsys):
    """transformers would read it with the package installed, and not without."""
    (saved / "base/adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    for what in (["--layer", "2"], ["--merge"]):
        with pytest.raises(SystemExit):
            export(saved, *what)
        assert "holds a backbone and an adapter of PEFT" in capsys.readouterr().err
