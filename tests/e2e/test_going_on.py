"""Runs that go on: from nothing, from before a first checkpoint, for longer; in other threads."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers.commands import arguments, fails, records, tune
from safetensors.torch import load_file, save_file

from ee_tuning import EarlyExitModel
from ee_tuning.adapter import checkpoints
from ee_tuning.cli import main
from ee_tuning.config import TuneConfig
from ee_tuning.errors import Notice
from ee_tuning.tune import tune as tune_exits


class Killed(BaseException):
    """As nothing that a run handles."""


def settings(base, data, out, **changes):
    """A small run as a config."""
    common = {
        "model": base, "layers": "1,3", "arch": "mlp", "data": [data], "out": str(out), "steps": 6,
        "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4, "lr": 1e-2,
        "save_every": 4, "eval_every": 2, "log_every": 1, "valid_fraction": 0.1,
    }  # fmt: skip
    return TuneConfig(**common | changes)


def killed_after(number):
    def on_step(done):
        if done == number:
            raise Killed

    return on_step


def weights(out):
    return load_file(Path(out) / "exits.safetensors")


def assert_same_weights(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """What an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("whole") / "exits"
    tune_exits(settings(base, data, out))
    return out


def test_resume_starts_where_there_is_nothing_yet(base, data, tmp_path, whole):
    """As a job queue asks for: the same command starts a run and goes on with it; one that is
    finished records nothing twice."""
    tune(base, data, tmp_path / "exits", save_every=4, resume=True)
    assert_same_weights(tmp_path / "exits", whole)
    before = records(tmp_path / "exits")
    tune(base, data, tmp_path / "exits", save_every=4, resume=True)
    assert_same_weights(tmp_path / "exits", whole)
    assert records(tmp_path / "exits") == before


def test_a_run_killed_before_its_first_checkpoint_goes_on(base, data, tmp_path, whole):
    """With the settings that it left, from its first step; what it recorded is recorded once."""
    with pytest.raises(Killed):
        tune_exits(settings(base, data, tmp_path / "cut"), on_step=killed_after(3))
    main(["tune", "--out", str(tmp_path / "cut"), "--resume"])
    assert_same_weights(tmp_path / "cut", whole)
    steps = [line["step"] for line in records(tmp_path / "cut") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_goes_on_for_more_steps(base, data, tmp_path, capsys):
    """Without a schedule, as a run that had so many from the beginning, bit for bit."""
    flat = {"min_lr": 1e-2, "warmup": 0}
    tune(base, data, tmp_path / "long", steps=9, **flat)
    tune(base, data, tmp_path / "exits", steps=6, **flat)
    capsys.readouterr()
    main(["tune", "--out", str(tmp_path / "exits"), "--resume", "--steps", "9"])
    said = " ".join(capsys.readouterr().err.split())
    assert "9 steps in place of 6: from step 7 on the learning rate is that of a run of 9" in said
    assert_same_weights(tmp_path / "exits", tmp_path / "long")
    assert [r["step"] for r in records(tmp_path / "exits") if "loss" in r] == list(range(1, 10))
    kept = (tmp_path / "exits/run.yaml").read_text()
    main(["tune", "--out", str(tmp_path / "exits"), "--resume", "--lr", "0.1"])  # 9, as it has kept
    assert_same_weights(tmp_path / "exits", tmp_path / "long")
    assert (tmp_path / "exits/run.yaml").read_text() == kept  # no step is of another rate


def test_a_low_learning_rate_alone(base, data, tmp_path):
    """The one that it falls to is kept as it was given, not at all: another `lr` has another."""
    tune(base, data, tmp_path / "whole", lr=5e-6)
    with pytest.raises(Killed):
        tune_exits(settings(base, data, tmp_path / "exits", lr=5e-6), on_step=killed_after(5))
    shutil.copytree(tmp_path / "exits", tmp_path / "lower")
    main(["tune", "--out", str(tmp_path / "exits"), "--resume"])
    assert_same_weights(tmp_path / "exits", tmp_path / "whole")
    main(["tune", "--out", str(tmp_path / "lower"), "--resume", "--lr", "1e-6", "--decay=linear"])
    rates = [line["lr"] for line in records(tmp_path / "lower") if "loss" in line]
    assert rates[4:] == pytest.approx([1e-7 + 9e-7 * left / 5.94 for left in (2, 1)])


def test_fewer_steps_than_a_run_has_made_are_refused(base, data, tmp_path, capsys, whole):
    shutil.copytree(whole, tmp_path / "exits")
    line = fails(capsys, "tune", "--out", tmp_path / "exits", "--resume", "--steps", 5)
    assert f"steps is 5, but {tmp_path / 'exits'} has made 6 already: give as many or more" in line


def test_a_run_outside_of_the_main_thread(base, data, tmp_path, whole):
    """As from a notebook's server: Python takes signal handlers in the main thread alone."""
    failed = []

    def run():
        try:
            tune_exits(settings(base, data, tmp_path / "exits"))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failed == []
    assert_same_weights(tmp_path / "exits", whole)


def spoil(weights_file, name):
    tensors = load_file(weights_file)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, weights_file, metadata={"format": "pt"})


def test_a_backbone_with_values_that_are_no_numbers(base, data, tmp_path, capsys):
    bad = shutil.copytree(base, tmp_path / "model")
    spoil(bad / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    line = fails(capsys, "tune", *arguments(bad, data, tmp_path / "exits"))
    assert "before the first step: model.model.layers.1.mlp.up_proj.weight has values that" in line
    assert "--lr" not in line


def test_exits_with_values_that_are_no_numbers(data, tmp_path, capsys, whole):
    bad = shutil.copytree(whole, tmp_path / "bad")
    spoil(bad / "exits.safetensors", "1.head.weight")
    flags = arguments(None, data, tmp_path / "exits", exits=bad, layers=None, arch=None)
    line = fails(capsys, "tune", *flags)
    assert "before the first step: exits.1.head.weight has values that are no numbers" in line


# -- checkpoints as saved exits ------------------------------------------------------------------


@pytest.fixture(scope="module", params=[{}, {"exit_vocab": 200, "head": "own", "arch": "layer"}])
def runs(request, base, data, tmp_path_factory):
    """A finished run, and the same cut off after its second checkpoint."""
    root = tmp_path_factory.mktemp("runs")
    common = request.param | {"save_every": 2, "keep": 9}
    tune_exits(settings(base, data, root / "whole", **common))
    with pytest.raises(Killed):
        tune_exits(settings(base, data, root / "cut", **common), on_step=killed_after(5))
    return root


def loaded(folder):
    return EarlyExitModel.from_pretrained(str(folder)).exit_state()


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_checkpoint_is_loaded_as_saved_exits(runs):
    last, before = (loaded(runs / f"whole/checkpoints/step-00000{n}") for n in (6, 4))
    assert_same(last, loaded(runs / "whole"))
    assert not torch.equal(last["3.head.weight"], before["3.head.weight"])
    with pytest.warns(Notice, match="is a run on its way: its exits are .*step-000004"):
        assert_same(loaded(runs / "cut"), before)


@pytest.mark.filterwarnings("ignore::ee_tuning.errors.Notice")
@pytest.mark.parametrize("name", ["cut", "cut/checkpoints/step-000002"])
def test_every_command_takes_a_checkpoint_or_a_run_on_its_way(runs, data, tmp_path, capsys, name):
    exits = str(runs / name)
    main(["inspect", exits])
    assert "for" in capsys.readouterr().out
    main(["generate", "--exits", exits, "--prompt", "def f", "--max-new-tokens", "4"])
    assert "mean depth" in capsys.readouterr().out
    small = ["--seq-length", "32", "--max-tokens", "64", "--prompts", "1", "--prompt-length", "8"]
    small += ["--max-new-tokens", "2", "--rounds", "1", "--out", str(tmp_path / "results")]
    main(["evaluate", "--exits", exits, "--data", data, *small])
    assert (tmp_path / "results/report.html").is_file()
    main(["export", "--exits", exits, "--merge", "--out", str(tmp_path / "merged")])
    assert_same(loaded(tmp_path / "merged"), loaded(exits))
    flags = arguments(None, data, tmp_path / "on", exits=exits, layers=None, arch=None, steps=1)
    main(["tune", *flags])


def test_a_run_is_replaced_although_a_checkpoint_of_it_was_evaluated(runs, base, data, tmp_path):
    """What `evaluate` left in a checkpoint is this project's, too."""
    out = shutil.copytree(runs / "cut", tmp_path / "cut")
    small = ["--seq-length", "32", "--max-tokens", "64", "--prompts", "1", "--prompt-length", "8"]
    checkpoint = str(out / "checkpoints/step-000002")
    main(["evaluate", "--exits", checkpoint, "--data", data, *small, "--max-new-tokens", "2"])
    assert (out / "checkpoints/step-000002/evaluation.json").is_file()
    tune(base, data, out, steps=1, overwrite=True)
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-000001"]


def test_checkpoints_are_ordered_by_their_steps(tmp_path):
    """By name, a millionth step comes before all others."""
    steps = [500, 999_500, 1_000_000, 12_000_000]
    for step in reversed(steps):
        (tmp_path / f"step-{step:06d}").mkdir()
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["step-000500", "step-999500", "step-1000000", "step-12000000"]


def test_a_damaged_checkpoint_is_a_line(runs, tmp_path, capsys):
    copy = shutil.copytree(runs / "cut/checkpoints/step-000004", tmp_path / "copy")
    (copy / "exit-3.safetensors").write_bytes(b"cut short")
    line = fails(capsys, "generate", "--exits", copy, "--prompt", "x")
    assert f"{copy} is damaged or holds other exits" in line


def test_a_line_of_metrics_cut_off_by_a_crash(runs, tmp_path, capsys):
    """The last one is dropped, another is named."""
    out = shutil.copytree(runs / "cut", tmp_path / "cut")
    log = out / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines) + lines[-1][:20])
    main(["tune", "--out", str(out), "--resume"])
    capsys.readouterr()
    assert_same_weights(out, runs / "whole")
    assert all("step" in json.loads(line) for line in log.read_text().splitlines())
    log.write_text("null\n" + log.read_text())
    flags = ["--out", out, "--resume", "--steps", "7"]
    assert f"{log} line 1 is damaged: it holds None" in fails(capsys, "tune", *flags)
    log.write_text("{\n" + log.read_text())
    assert f"{log} line 1 is not valid JSON: remove it" in fails(capsys, "tune", *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [("null", "it holds None, no JSON object"), ("{}", "it lacks settings, step")],
)
def test_a_damaged_state(runs, tmp_path, capsys, text, message):
    out = shutil.copytree(runs / "cut", tmp_path / "cut")
    state = out / "checkpoints/step-000004/state.json"
    state.write_text(text)
    line = fails(capsys, "tune", "--out", out, "--resume")
    assert f"{state} is damaged: {message}; remove {state.parent} and resume from the one" in line


# -- the same names, other contents ----------------------------------------------------------------


def change(path):
    """Another value for one of the backbone's weights, in place."""
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1" in name and "down_proj" in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def begun(base, data, tmp_path):
    """A run that was stopped, on a backbone and data of its own: flags of those, and its folder."""
    own, text = tmp_path / "base", tmp_path / "data.jsonl"
    shutil.copytree(base, own)
    shutil.copy(data, text)
    with pytest.raises(Killed):
        tune_exits(settings(str(own), str(text), tmp_path / "exits"), on_step=killed_after(5))
    return own, text, tmp_path / "exits"


def test_resume_refuses_a_backbone_changed_in_place(begun, capsys):
    own, _, out = begun
    change(own / "model.safetensors")
    line = fails(capsys, "tune", "--out", out, "--resume")
    assert "backbone: layer 2 is not what it was when the run began" in line


def test_resume_refuses_data_replaced_under_the_same_name(begun, capsys):
    _, text, out = begun
    lines = text.read_text().splitlines()
    text.write_text("\n".join(lines[:-1] + lines[:1]) + "\n")
    line = fails(capsys, "tune", "--out", out, "--resume")
    assert "data to tune on is not what it was when the run began" in line


def test_resume_goes_on_with_the_same_contents_elsewhere(begun, tmp_path, whole):
    own, text, out = begun
    own.rename(tmp_path / "moved")
    text.rename(tmp_path / "moved.jsonl")
    elsewhere = settings(str(tmp_path / "moved"), str(tmp_path / "moved.jsonl"), out, resume=True)
    tune_exits(elsewhere)
    assert_same_weights(out, whole)
