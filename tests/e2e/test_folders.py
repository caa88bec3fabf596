"""What commands write, who may read it, and what they leave where something is already."""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml
from helpers.commands import PATIENCE, arguments, fails, read_all, records, tune
from helpers.forks import fork
from helpers.struck import run as struck_run

from ee_tuning import EarlyExitModel, UserError
from ee_tuning.cli import main
from ee_tuning.folders import REPLACED, UNFINISHED, claim, foreign
from ee_tuning.tune.step import Tuner


@pytest.fixture(scope="module")
def exits(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "exits"
    tune(base, data, out, arch="mlp,layer", steps=2)
    return out


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_what_is_written_has_the_mode_of_new_files(umask, exits, base, data, tmp_path):
    before = os.umask(umask)
    try:
        main(["init", "--model", base, "--layers", "2", "--out", str(tmp_path / "init")])
        tune(base, data, tmp_path / "tune", steps=2, trace=True)
        for name, what in (("exit", ["--layer", "3"]), ("merged", ["--merge"])):
            out = ["--out", str(tmp_path / name)]
            main(["export", "--exits", str(exits), *what, *out])
        EarlyExitModel.from_pretrained(str(exits)).save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert len([path for path in files if path.suffix == ".safetensors"]) >= 9
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o777 & ~umask}


@pytest.fixture
def old(exits, tmp_path):
    """A copy of tuned exits, their run and their evaluation."""
    shutil.copytree(exits, tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize(
    "mistake",
    [
        "init --model BASE --layers 99 --out NEW",
        "tune --model BASE --layers 1 --arch norm --data typo.jsonl --out NEW",
        "export --exits EXITS --layer 4 --out NEW",
        "evaluate --exits EXITS --data typo.jsonl --out NEW",
        "regenerate --model BASE --data typo.jsonl --tokens 9 --out NEW/own.jsonl",
        "suggest --model /nowhere --out NEW/found.json",
    ],
)
def test_a_mistake_leaves_no_folder_behind(mistake, exits, base, tmp_path, capsys):
    there = tmp_path / "there"
    there.mkdir()
    places = {"BASE": base, "EXITS": exits}
    for new in ("new", "there", "there/deep/er"):
        words = mistake.replace("NEW", str(tmp_path / new)).split()
        fails(capsys, *(places.get(word, word) for word in words))
        assert [*tmp_path.rglob("*")] == [there]


MISTAKES = [
    {"data": "typo.jsonl"},
    {"valid_data": "typo.jsonl"},
    {"model": "/nowhere"},
    {"layers": "9"},
    {"layers": None, "exits": "/nowhere"},
    {"lr": 0},
    {"loss_weights": [1, 2, 3]},
    {"seq_length": 4096},
    {"tokenizer": "/nowhere"},
    {"exit_vocab": 5000},
    {"log_to": "wandb"},
    {"stage_layers": [1, 3]},
]


@pytest.mark.parametrize("changes", MISTAKES, ids=str)
def test_a_mistake_in_an_overwriting_run_leaves_all_as_it_was(
    changes, base, data, old, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = read_all(old)
    changes = {"model": base, "data": data} | changes
    flags = arguments(changes.pop("model"), changes.pop("data"), old, overwrite=True, **changes)
    fails(capsys, "tune", *flags)
    assert read_all(old) == before


@pytest.mark.parametrize("changes", [{"layers": "9"}, {"model": "/nowhere"}, {"arch": "mpl"}])
def test_a_mistake_in_an_overwriting_init_leaves_all_as_it_was(changes, base, old, capsys):
    before = read_all(old)
    flags = {"model": base, "layers": "2"} | changes
    flags = [word for name, value in flags.items() for word in (f"--{name}", value)]
    fails(capsys, "init", *flags, "--out", old, "--overwrite")
    assert read_all(old) == before
    main(["init", "--model", base, "--layers", "2", "--out", str(old), "--overwrite"])
    assert set(read_all(old)) == {"exits.safetensors", "exit_config.json", "README.md"}
    assert EarlyExitModel.from_pretrained(str(old)).exit_layers == [2]


def test_the_old_exits_stay_until_the_new_ones_are_whole(base, data, old, monkeypatch):
    """In their place until the first checkpoint, aside until the end."""
    before, seen, step = read_all(old), [], Tuner.step

    def watched(tuner, *args):
        seen.append((read_all(old), sorted(path.name for path in old.iterdir())))
        return step(tuner, *args)

    monkeypatch.setattr(Tuner, "step", watched)
    tune(base, data, old, overwrite=True, steps=4, log_to="tensorboard", layers="2")
    for files, _ in seen[:2]:  # saved after the second
        assert {name: files[name] for name in before} == before
    for files, names in seen[2:]:
        assert {name: files[f"{REPLACED}/{name}"] for name in before} == before
        assert names == [REPLACED, "checkpoints", "metrics.jsonl", "run.yaml", "tensorboard"]
    assert len(seen) == 4
    assert not {REPLACED, UNFINISHED} & {path.name for path in old.iterdir()}
    assert [line["step"] for line in records(old) if "loss" in line] == [1, 2, 3, 4]
    assert len(list((old / "tensorboard").iterdir())) == 2  # before and after the first checkpoint
    assert [path.name for path in sorted((old / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000004",
    ]
    assert EarlyExitModel.from_pretrained(str(old)).exit_layers == [2]


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_a_second_run_in_a_folder_is_refused_while_the_first_one_is_on_its_way(
    how, exits, base, data, tmp_path, capsys, monkeypatch
):
    out, step, settings = tmp_path / "out", Tuner.step, {"arch": "mlp,layer", "steps": 2}
    again, refused = arguments(base, data, out, **settings, **{how: True}), []

    def meanwhile(tuner, *args):
        monkeypatch.setattr(Tuner, "step", step)
        before = read_all(out)
        refused.append(fails(capsys, "tune", *again))
        assert read_all(out) == before
        return step(tuner, *args)

    monkeypatch.setattr(Tuner, "step", meanwhile)
    tune(base, data, out, **settings)
    assert refused == [
        f"ee-tuning: another run writes to {out}: wait for its end, or choose another --out"
    ]
    assert read_all(out)["exits.safetensors"] == read_all(exits)["exits.safetensors"]
    main(["tune", *again])


def test_a_file_system_without_locks_is_written_to(base, data, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    tune(base, data, tmp_path / "out", steps=1)
    assert (tmp_path / "out/exits.safetensors").exists()


def test_overwriting_nothing_is_a_run_like_any_other(base, data, tmp_path, monkeypatch):
    """Its files are in their place from the first step on; failing, it leaves nothing hidden."""
    seen, step, out = [], Tuner.step, tmp_path / "out"

    def watched(tuner, *args):
        seen.append({path.name for path in out.iterdir()})
        return step(tuner, *args)

    monkeypatch.setattr(Tuner, "step", watched)
    tune(base, data, out, overwrite=True, steps=2)
    assert seen[0] == {REPLACED, "run.yaml", "metrics.jsonl"}
    assert REPLACED not in {path.name for path in out.iterdir()}
    monkeypatch.setattr(Tuner, "step", lambda *_: (_ for _ in ()).throw(UserError("spoiled")))
    with pytest.raises(SystemExit):
        tune(base, data, tmp_path / "failed", overwrite=True)
    assert {path.name for path in (tmp_path / "failed").iterdir()} == {"run.yaml", "metrics.jsonl"}


def test_a_run_that_fails_before_its_first_checkpoint_leaves_all_as_it_was(
    base, data, old, capsys, monkeypatch
):
    before = read_all(old)
    monkeypatch.setattr(Tuner, "step", lambda *_: (_ for _ in ()).throw(UserError("spoiled")))
    assert "spoiled" in fails(capsys, "tune", *arguments(base, data, old, overwrite=True))
    assert read_all(old) == before


def test_a_killed_overwriting_run_goes_on_with_resume(base, data, old, tmp_path):
    """Killed as it saves its first checkpoint: the old exits are in their place."""
    before = read_all(old)
    flags = arguments(base, data, old, overwrite=True, layers="2", steps=3)
    struck = (struck_run, int(signal.SIGKILL), tmp_path / "struck", "tune", *flags)
    process = fork(tmp_path / "said", *struck, env={"STRUCK_AT": "1"})
    assert process.wait(PATIENCE) == -signal.SIGKILL
    kept = read_all(old)
    assert {name: kept[name] for name in before} == before
    assert yaml.safe_load((old / UNFINISHED / "run.yaml").read_text())["layers"] == "2"
    main(["tune", f"--out={old}", "--resume"])
    assert not {REPLACED, UNFINISHED} & {path.name for path in old.iterdir()}
    tune(base, data, tmp_path / "whole", layers="2", steps=3)
    assert (old / "exits.safetensors").read_bytes() == (
        tmp_path / "whole/exits.safetensors"
    ).read_bytes()


def test_what_was_not_written_here_is_not_overwritten(base, data, old, capsys):
    """Whatever its name: a README, a checkpoint of something else, notes."""
    for name, content in {
        "README.md": "# My project",
        "checkpoints/llm/model.pt": "weights",
        "notes.txt": "mine",
        "metrics.jsonl": "loss 3.2",
        "exits.safetensors": "no tensors",
        "exit_config.json": "{}",
        "run.yaml": "steps: 5",
        "tensorboard/mine.txt": "mine",
    }.items():
        path = old / name
        there = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        before = read_all(old)
        for flags in (
            ["tune", *arguments(base, data, old, overwrite=True)],
            ["init", "--model", base, "--layers", "2", "--out", old, "--overwrite"],
        ):
            line = fails(capsys, *flags)
            assert f"did not write, or what was changed since: {name};" in line
        assert read_all(old) == before
        path.unlink() if there is None else path.write_bytes(there)
        if there is None and path.parent != old:
            path.parent.rmdir()
    assert foreign(old) == []


def test_everything_that_commands_write_is_known_again(base, data, old, tmp_path):
    assert foreign(old) == []
    small = [
        "--seq-length",
        "32",
        "--prompts",
        "1",
        "--max-new-tokens",
        "4",
        "--rounds",
        "1",
        "--prompt-length",
        "8",
    ]
    main(["evaluate", "--exits", str(old), "--data", data, *small])
    assert foreign(old) == []
    tune(base, data, tmp_path / "run", steps=3, trace=True, log_to="tensorboard")
    assert foreign(tmp_path / "run") == []
    for what in (["--layer", "3"], ["--merge"]):
        main(["export", "--exits", str(old), *what, "--out", str(tmp_path / what[0])])
        assert foreign(tmp_path / what[0]) == []
    main(["evaluate", "--exits", str(tmp_path / "--merge"), "--data", data, *small])
    assert foreign(tmp_path / "--merge") == []


def test_a_report_of_somebody_else_is_not_overwritten(base, data, old, capsys):
    (old / "report.html").write_text("<h1>Quarter 3</h1>")
    line = fails(capsys, "evaluate", "--exits", old, "--data", data)
    assert "report.html; move it elsewhere" in line
    assert (old / "report.html").read_text() == "<h1>Quarter 3</h1>"


def test_what_a_run_starts_from_is_not_overwritten(base, data, old, tmp_path, capsys):
    before = read_all(old)
    flags = arguments(base, data, old, overwrite=True, exits=old, layers=None, model=None)
    assert "is what this starts from" in fails(capsys, "tune", *flags)
    main(["export", "--exits", str(old), "--merge", "--out", str(tmp_path / "merged")])
    merged = tmp_path / "merged"
    flags = ["init", "--model", merged, "--layers", "2", "--out", merged, "--overwrite"]
    assert "is what this starts from" in fails(capsys, *flags)
    assert read_all(old) == before


def test_what_came_meanwhile_stays(tmp_path):
    """Into the way: the new one is kept beside; elsewhere: it stays where it is."""
    folder = tmp_path / "out"
    (folder / "checkpoints/step-000001").mkdir(parents=True)
    (folder / "checkpoints/step-000001/state.json").write_text("{}")
    output = claim(str(folder), overwrite=True)
    output.begin()
    (output.path / "run.yaml").write_text("# ee-tuning 1\n")
    (folder / "notes.txt").write_text("mine")
    output.take_place()
    output.finish()
    assert set(read_all(folder)) == {"run.yaml", "notes.txt"}
    (folder / "notes.txt").unlink()
    output = claim(str(folder), overwrite=True)
    output.begin()
    (output.path / "run.yaml").write_text("# ee-tuning 2\n")
    (folder / "run.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"changed since: run\.yaml"):
        output.take_place()
    assert (folder / "run.yaml").read_text() == "mine"
    assert (output.path / "run.yaml").read_text() == "# ee-tuning 2\n"


def test_a_model_card_that_was_edited_is_not_overwritten(base, data, old, capsys):
    card = old / "README.md"
    card.write_text(card.read_text().replace("# Early exits", "# My best exits"))
    before = read_all(old)
    line = fails(capsys, "tune", *arguments(base, data, old, overwrite=True))
    assert "or what was changed since: README.md;" in line
    assert read_all(old) == before


def test_a_folder_that_cannot_be_read_is_refused_in_a_line(tmp_path, monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", unreadable)
    with pytest.raises(UserError, match=r"cannot read .*: Permission denied; choose another --out"):
        claim(str(tmp_path / "out"), overwrite=True)
