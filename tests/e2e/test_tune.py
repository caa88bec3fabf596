"""`ee-tuning tune` as a user runs it: files, resuming, reproducibility, bad input."""

import json
import os
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import PATIENCE, arguments, fails, records, tune
from helpers.families import tiny
from helpers.forks import fork
from helpers.struck import run as struck_run
from safetensors.torch import load_file

from ee_tuning import EarlyExitModel
from ee_tuning.cli import main
from ee_tuning.errors import Notice
from ee_tuning.quantise.packages import PACKAGES
from ee_tuning.tune.step import Tuner


def test_files_metrics_and_falling_losses(base, data, tmp_path):
    weights = load_file(Path(base) / "model.safetensors")
    tune(base, data, tmp_path / "exits", log_to="tensorboard")
    out = tmp_path / "exits"
    names = {p.name for p in out.iterdir()}
    assert names == {
        "exits.safetensors", "exit_config.json", "README.md", "run.yaml", "metrics.jsonl",
        "checkpoints", "tensorboard",
    }  # fmt: skip
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        "step-000004",
        "step-000006",
    ]
    lines = records(out)
    valid = [line["valid_loss"] for line in lines if "valid_loss" in line]
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 2, 4, 6]
    assert all(valid[-1][layer] < valid[0][layer] for layer in ("1", "3"))
    steps = [line for line in lines if "loss" in line]
    assert [line["tokens"] for line in steps] == [128 * i for i in range(1, 7)]
    assert {"lr", "loss", "grad_norm", "tokens_per_second"} <= steps[0].keys()
    assert yaml.safe_load((out / "run.yaml").read_text())["seq_length"] == 32
    after = load_file(Path(base) / "model.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    model = EarlyExitModel.from_pretrained(str(out))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (
        300 * 32 + 32 + 3 * 32 * 48
    )


def test_two_runs_give_the_same_bits(base, data, tmp_path):
    for name in ("a", "b"):
        tune(base, data, tmp_path / name, loss="mixed", dynamic_weights=True, init="random")
    a, b = (load_file(tmp_path / n / "exits.safetensors") for n in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_tuning_goes_on_from_saved_exits(base, data, tmp_path):
    main(
        ["init", "--model", base, "--layers", "2", "--arch", "norm", "--out", str(tmp_path / "new")]
    )
    tune(base, data, tmp_path / "exits", exits=tmp_path / "new", layers=None, model=None)
    new, tuned = (load_file(tmp_path / n / "exits.safetensors") for n in ("new", "exits"))
    assert new.keys() == tuned.keys()
    assert not torch.equal(new["2.norm.weight"], tuned["2.norm.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_equals_uninterrupted(how, base, data, tmp_path):
    """Bit for bit, whether killed as it saves a checkpoint or stopped with Ctrl-C."""
    common = {"steps": 12, "layers": "1,3", "arch": "layer"}
    tune(base, data, tmp_path / "whole", **common)
    flags = arguments(base, data, tmp_path / "cut", **common)
    process = fork(tmp_path / "said", struck_run, int(how), tmp_path / "struck", "tune", *flags)
    status = process.wait(PATIENCE)
    saved = sorted(path.name for path in (tmp_path / "cut/checkpoints").glob("step-*"))
    if how == signal.SIGINT:
        assert status == 130
        assert "stopped after step 8; go on with --resume" in process.said
        assert "Traceback" not in process.said
    else:
        assert status == -how
        assert saved == ["step-000002", "step-000004"]
    main(["tune", "--out", str(tmp_path / "cut"), "--resume"])
    whole, cut = (load_file(tmp_path / n / "exits.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    kept = ("step", "loss", "valid_loss", "lr", "grad_norm")
    curves = [
        [{k: line.get(k) for k in kept} for line in records(tmp_path / n)] for n in ("whole", "cut")
    ]
    assert curves[0] == curves[1]


BAD = [
    ({"layers": "0"}, "layers are counted from 1"),
    ({"layers": "5"}, "layers 1 to 4"),
    ({"layers": "2,2"}, "given twice"),
    ({"layers": None}, "either --exits or --layers"),
    ({"model": "/nowhere"}, "cannot read the backbone /nowhere"),
    ({"model": None}, "no backbone given"),
    ({"data": []}, "no data given"),
    ({"data": "nowhere.jsonl"}, "does not exist"),
    ({"out": None}, "no output folder"),
    ({"resume": True, "data": []}, "x' to go on with, and no data given"),
    ({"resume": True, "data": [], "out": None}, "no run to go on with given: name its folder with"),
    ({"valid_fraction": 0}, "valid_fraction is 0.0: it must be above 0 and below 1"),
    ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
    ({"steps": 0}, "at least 1"),
    ({"lr": -1}, "above 0"),
    ({"log_every": 0}, "log_every is 0: it must be at least 1"),
    ({"beta1": 2}, "beta1 is 2.0: it must be at least 0 and below 1"),
    ({"seq_length": 4096}, "beyond the backbone's context of 128"),
    ({"loss_weights": [1, 2, 3]}, "3 loss_weights, exits: 2; give one each"),
    ({"device": "cuda:7"}, "cannot be used"),
    ({"device": "mps"}, "from the 'MPS' backend; use --device cpu"),
    ({"lr": "fast"}, "lr is 'fast': it must be a number"),
    ({"seq_lenght": 3}, "did you mean --seq-length?"),
    ({"arch": "embedding", "head": "shared"}, "nothing to tune"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings(changes, message, base, data, tmp_path, capsys):
    changes = {"out": tmp_path / "x", "data": data} | changes
    flags = arguments(base, changes.pop("data"), changes.pop("out"), **changes)
    assert message in fails(capsys, "tune", *flags)


def test_settings_that_the_loss_ignores_are_named(base, data, tmp_path):
    flags = {"kl_weight": 0.7, "kl_temperature": 2, "draft_steps": 3, "steps": 1}
    with pytest.warns(Notice) as told:
        tune(base, data, tmp_path / "ce", **flags)
    assert [str(notice.message) for notice in told] == [
        "loss ce ignores kl_temperature and kl_weight",
        "a run without a draft exit ignores draft_steps",
    ]
    flags |= {"loss_weight_start": 2, "valid_data": data, "valid_fraction": 0.2}
    with pytest.warns(Notice) as told:
        tune(base, data, tmp_path / "valid", loss="mixed", **flags | {"draft_steps": None})
    assert [str(notice.message) for notice in told] == [
        "a run with valid_data ignores valid_fraction",
        "a run without loss_weight_warmup ignores loss_weight_start",
    ]
    flags = {"kl_weight": 0.7, "steps": 1, "loss_weight_start": 2, "loss_weight_warmup": 1}
    with warnings.catch_warnings(record=True) as told:
        tune(base, data, tmp_path / "mixed", loss="mixed", **flags | {"draft_steps": None})
    assert [notice for notice in told if notice.category is Notice] == []


def test_bad_yaml(base, data, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    for text, message in (
        ("seq_lenght: 3", "did you mean seq_length?"),
        ("steps: many", "steps"),
        ("steps: [", "run.yaml"),
    ):
        path.write_text(text)
        assert message in fails(capsys, "tune", "--config", path)
    assert "nowhere.yaml" in fails(capsys, "tune", "--config", "nowhere.yaml")


def test_yaml_flag_default_order(base, data, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\nlog_every: 5\nlr: 0.5\n")
    flags = arguments(base, data, tmp_path / "exits", lr=0.25, steps=None, log_every=None)
    main(["tune", "--config", str(path), *flags])
    saved = yaml.safe_load((tmp_path / "exits/run.yaml").read_text())
    assert (saved["steps"], saved["lr"], saved["beta2"]) == (5, 0.25, 0.95)


def test_output_folder_is_not_overwritten_by_accident(base, data, tmp_path, capsys):
    tune(base, data, tmp_path / "exits")
    before = (tmp_path / "exits/exits.safetensors").read_bytes()
    assert "not empty" in fails(capsys, "tune", *arguments(base, data, tmp_path / "exits"))
    assert (tmp_path / "exits/exits.safetensors").read_bytes() == before
    tune(base, data, tmp_path / "exits", overwrite=True, lr=1e-3)
    assert (tmp_path / "exits/exits.safetensors").read_bytes() != before


def test_resume_refuses_other_exits_or_data(base, data, tmp_path, capsys):
    tune(base, data, tmp_path / "exits")
    flags = arguments(base, data, tmp_path / "exits", resume=True, layers="1,2")
    assert "layers was '1,3' and is now '1,2'" in fails(capsys, "tune", *flags)


def test_loss_that_is_not_finite_stops_the_run(base, data, tmp_path, capsys, monkeypatch):
    original = Tuner.step
    calls = []

    def spoiled(*args):
        found = original(*args)
        calls.append(1)
        spoilt = {3: torch.tensor(float("nan"))} if len(calls) == 5 else {}
        return replace(found, losses=found.losses | spoilt)

    monkeypatch.setattr(Tuner, "step", spoiled)
    line = fails(capsys, "tune", *arguments(base, data, tmp_path / "exits"))
    assert "exit 3 is nan" in line
    assert "at step 5" in line
    monkeypatch.undo()
    main(["tune", "--out", str(tmp_path / "exits"), "--resume"])
    tune(base, data, tmp_path / "whole")
    a, b = (load_file(tmp_path / n / "exits.safetensors") for n in ("exits", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_space_left_keeps_the_previous_checkpoint(base, data, tmp_path, capsys, monkeypatch):
    import errno

    import ee_tuning.tune.checkpoint as checkpoint

    original = checkpoint.save_file

    def full_disk(tensors, path, *args, **kwargs):
        if "step-000004" in str(path) and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    line = fails(capsys, "tune", *arguments(base, data, tmp_path / "exits"))
    assert "No space left on device" in line
    found = [p.name for p in (tmp_path / "exits/checkpoints").iterdir()]
    assert found == ["step-000002"]
    monkeypatch.undo()
    main(["tune", "--out", str(tmp_path / "exits"), "--resume"])


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def whole_and_resumed(base, data, folder, **settings):
    """The exits of a run, and of one that went on from the checkpoint before its last."""
    for name in ("whole", "cut"):
        tune(base, data, folder / name, **settings)
    shutil.rmtree(folder / "cut/checkpoints/step-000006")
    (folder / "cut/exits.safetensors").unlink()
    main(["tune", "--out", str(folder / "cut"), "--resume"])
    return [load_file(folder / name / "exits.safetensors") for name in ("whole", "cut")]


@pytest.mark.slow
def test_fp8_backbone_and_exits_resume_bit_for_bit_and_load_on_the_plain_backbone(
    base, data, tmp_path
):
    settings = {"backbone_precision": "fp8", "exit_precision": "fp8", "head": "own,shared"}
    with pytest.warns(UserWarning, match="no fp8 matrix units"):
        a, b = whole_and_resumed(base, data, tmp_path, **settings)
    assert all(torch.equal(a[name], b[name]) for name in a)
    EarlyExitModel.from_pretrained(str(tmp_path / "whole"))


@pytest.mark.parametrize("precision", PACKAGES)
def test_quantised_backbone_resumes_bit_for_bit_and_exits_load_on_the_plain_one(
    precision, tokenizer, data, tmp_path
):
    pytest.importorskip(PACKAGES[precision])
    base = str(tmp_path / "base")
    tiny("llama", vocab_size=300, hidden_size=64, intermediate_size=128).save_pretrained(base)
    tokenizer.save_pretrained(base)
    stored = (Path(base) / "model.safetensors").read_bytes()
    a, b = whole_and_resumed(base, data, tmp_path, backbone_precision=precision, head="own,shared")
    assert all(torch.equal(a[name], b[name]) for name in a)
    tune(base, data, tmp_path / "plain", head="own,shared")
    plain = load_file(tmp_path / "plain/exits.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {
        k: (v.shape, v.dtype) for k, v in plain.items()
    }
    last, expected = (records(tmp_path / name)[-1]["valid_loss"] for name in ("whole", "plain"))
    assert last == pytest.approx(expected, rel=0.02)
    assert (Path(base) / "model.safetensors").read_bytes() == stored
    EarlyExitModel.from_pretrained(str(tmp_path / "whole"))


def test_exits_with_a_reduced_vocabulary_from_tuning_to_decoding(base, data, tmp_path, capsys):
    settings = {"exit_vocab": 40, "head": "own,shared"}
    a, b = whole_and_resumed(base, data, tmp_path, **settings)
    assert "exits know 40 of 300 tokens" in capsys.readouterr().err.replace("\n", " ")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["vocabulary"].shape == (40,)
    assert a["1.head.weight"].shape == (40, 32)
    assert not any(name.startswith("3.output") for name in a)
    model = EarlyExitModel.from_pretrained(str(tmp_path / "whole"))
    out = model.generate(torch.tensor([[5, 9]]), threshold=0.0, max_new_tokens=8, eos_token_id=None)
    assert set(out.exit_layers[0].tolist()) <= {1, 4}
    left = out.sequences[0, 2:][out.exit_layers[0] == 1]
    assert torch.isin(left, a["vocabulary"]).all()
    flags = "--seq-length 32 --prompts 1 --max-new-tokens 4 --rounds 1 --prompt-length 8"
    exits = ["--exits", str(tmp_path / "whole")]
    main(["evaluate", *exits, "--data", str(data), *flags.split()])
    found = json.loads((tmp_path / "whole/evaluation.json").read_text())
    assert 0 < found["unknown_targets"] < 0.5
    assert "are not in the exits' vocabulary" in " ".join(capsys.readouterr().out.split())
    assert "are not in the exits" in (tmp_path / "whole/report.html").read_text()
    # What an exit does not know it cannot say: full depth says it all the same.
    agreement = [row["agreement"] for row in found["exit_rows"]]
    assert agreement[-1] == 1
    main(["inspect", exits[1]])
    assert "know 40 of 300 tokens" in " ".join(capsys.readouterr().out.split())
    line = fails(capsys, "export", *exits, "--layer", "1", "--out", "x")
    assert "knows 40 tokens" in line
    tune(base, data, tmp_path / "more", exits=str(tmp_path / "whole"), layers="")


@pytest.mark.slow
@pytest.mark.parametrize("master_weights", ["bf16", "fp32"])
def test_8_bit_optimizer_resumes_bit_for_bit_with_either_weights(
    master_weights, base, data, tmp_path
):
    """Weights in bf16 are rounded stochastically: the same way again."""
    settings = {"exit_vocab": 256, "optimizer": "adamw-8bit"}
    settings |= {"master_weights": master_weights, "precision": "bf16"}
    a, b = whole_and_resumed(base, data, tmp_path, **settings)
    assert all(torch.equal(a[name], b[name]) for name in a)
    saved = [
        load_file(tmp_path / run / "checkpoints/step-000006" / f"{kind}-1.safetensors")
        for kind in ("exit", "optimizer")
        for run in ("whole", "cut")
    ]
    assert saved[2]["head.weight:exp_avg:codes"].dtype == torch.uint8
    for one, other in (saved[:2], saved[2:]):
        assert all(torch.equal(one[name], other[name]) for name in one)
    valid = [line["valid_loss"] for line in records(tmp_path / "whole") if "valid_loss" in line]
    assert all(valid[-1][layer] < valid[0][layer] for layer in ("1", "3"))


@pytest.mark.parametrize(("function", "after"), [("mean_losses", 0), ("step", 2)])
def test_running_out_of_memory_names_the_largest_parts(
    function, after, base, data, tmp_path, capsys, monkeypatch
):
    """Wherever it happens; the last checkpoint is good, if there is one."""
    calls, real = [], getattr(Tuner, function)

    def fails_later(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(Tuner, function, fails_later)
    out = tmp_path / "exits"
    line = fails(capsys, "tune", *arguments(base, data, out, save_every=1))
    assert "the largest parts are" in line
    assert "see ee-tuning plan" in line
    if not after:
        assert "out of memory at the start: nothing was saved yet" in line
        return
    assert "out of memory at step 3" in line
    assert "step-000002 is good, go on with --resume" in line
    monkeypatch.setattr(Tuner, function, real)
    main(["tune", *arguments(base, data, out, save_every=1), "--resume"])


def test_bf16_weights_without_stochastic_rounding_are_refused(base, data, tmp_path, capsys):
    flags = arguments(base, data, tmp_path / "exits", master_weights="bf16")
    assert "--optimizer adamw-8bit" in fails(capsys, "tune", *flags)
