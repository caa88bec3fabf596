"""How the command line reads what it is given, and what it says."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from helpers.commands import PATIENCE

from ee_tuning.cli import COMMANDS, main
from ee_tuning.config import TuneConfig
from ee_tuning.errors import UserError
from ee_tuning.parsing import check_folders, parse


def read(command, *args):
    return parse(command, COMMANDS[command], list(args))


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a file of settings; gives its path."""

    def write(text):
        (tmp_path / "settings.yaml").write_text(text)
        return str(tmp_path / "settings.yaml")

    return write


@pytest.mark.parametrize("args", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_imports_neither_torch_nor_transformers(args):
    code = (
        "import sys; from ee_tuning.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, *args, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stderr.strip() == "[]"
    assert done.stdout.startswith("usage: ee-tuning")


LISTS = [
    (command, field.name)
    for command, config_class in COMMANDS.items()
    for field in dataclasses.fields(config_class)
    if str(field.type).startswith("list[")
]


@pytest.mark.parametrize(("command", "name"), LISTS)
def test_repeated_list_flags_add_up_and_replace_the_files(command, name, yaml_file):
    flag = f"--{name.replace('_', '-')}"
    file = yaml_file(f"{name}: [9]\n")
    for args in ([flag, "1", flag, "2", "3"], [f"{flag}=1", f"{flag}=2", flag, "3"]):
        assert [*map(float, getattr(read(command, *args), name))] == [1, 2, 3]
        with_file = read(command, "--config", file, *args)
        assert [*map(float, getattr(with_file, name))] == [1, 2, 3]
    assert [*map(float, getattr(read(command, "--config", file), name))] == [9]


@pytest.mark.parametrize(
    ("command", "name", "values"),
    [
        ("init", "layers", ["4", "8"]),
        ("tune", "arch", ["mlp", "layer"]),
        ("plan", "head", ["own", "shared"]),
        ("generate", "exit_layers", ["4", "1/2"]),
        ("evaluate", "thresholds", ["1", "0.5"]),
    ],
)
def test_repeated_flags_with_commas_add_up(command, name, values, yaml_file):
    flag = f"--{name.replace('_', '-')}"
    file = ["--config", yaml_file(f"{name}: '9'\n")]
    once = getattr(read(command, flag, ",".join(values)), name)
    assert once == ",".join(values)
    for args in (
        [flag, values[0], flag, values[1]],
        [f"{flag}={values[0]}", f"{flag}={values[1]}"],
    ):
        assert getattr(read(command, *args), name) == once
        assert getattr(read(command, *file, *args), name) == once
        assert getattr(read(command, *args, "--seed=3"), name) == once
    assert getattr(read(command, flag, "", "--seed=3"), name) == ""


@pytest.mark.parametrize(("command", "name"), LISTS)
def test_a_single_value_in_yaml_is_a_list_of_one(command, name, yaml_file):
    read_from_list = read(command, "--config", yaml_file(f"{name}: [3]\n"))
    assert len(getattr(read_from_list, name)) == 1
    assert read(command, "--config", yaml_file(f"{name}: 3\n")) == read_from_list


def test_equals_signs_everywhere(tmp_path, yaml_file):
    """In place of a space before a value, also of --config, --out and --resume."""
    (tmp_path / "run.yaml").write_text("data: [a.jsonl]\nsteps: 7\n")
    for out in (["--out", str(tmp_path)], [f"--out={tmp_path}"]):
        for resume in ("--resume", "--resume=true"):
            config = read("tune", *out, resume)
            assert (config.data, config.steps, config.resume) == (["a.jsonl"], 7, True)
        assert read("tune", *out, "--resume=false").data == []
    file = yaml_file("steps: 3\nlr: 0.5\n")
    for config in (["--config", file], [f"--config={file}"]):
        assert read("tune", *config).steps == 3
    assert read("generate", "--prompt=--x=y", "--mode=full").prompt == "--x=y"


def test_a_flag_beats_the_file_wherever_it_stands(yaml_file):
    file = yaml_file("steps: 3\nlr: 0.5\n")
    for args in (["--steps=5", "--config", file], [f"--config={file}", "--steps", "5"]):
        config = read("tune", *args)
        assert (config.steps, config.lr) == (5, 0.5)


def test_paths_with_a_tilde(monkeypatch, yaml_file):
    monkeypatch.setenv("HOME", "/home/someone")
    home = "/home/someone"
    file = yaml_file("model: ~/model\ndata: ['~/a.jsonl=0.7', hub/id]\n")
    config = read("tune", f"--config={file}", "--out=~/exits", "--tokenizer", "~/tokens")
    assert config.model == f"{home}/model"
    assert config.data == [f"{home}/a.jsonl=0.7", "hub/id"]
    assert (config.out, config.tokenizer) == (f"{home}/exits", f"{home}/tokens")
    assert read("inspect", "~/exits").path == f"{home}/exits"
    assert read("export", "--exits=~/e").exits == f"{home}/e"
    assert read("evaluate", "--data", "~/a", "--data=~/b").data == [f"{home}/a", f"{home}/b"]
    assert read("generate", "--exits=~/e", "--prompt=~/x").prompt == "~/x"
    assert TuneConfig(out="~/exits").out == f"{home}/exits"


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("tune", ["--layers", "4", "8"], "--layers takes one value: write 4,8"),
        ("tune", ["--layers", "4,", "8"], "--layers takes one value: write 4,8"),
        ("tune", ["--layers=4", "8", "--lr", "1"], "--layers takes one value: write 4,8"),
        ("evaluate", ["--thresholds", "1", "0.5"], "--thresholds takes one value: write 1,0.5"),
        ("generate", ["--prompt", "a", "b c"], "--prompt takes one value: write 'a b c'"),
        ("generate", ["--prompt", "a", "b", "c", "--seed=3"], "one value: write 'a b c'"),
        ("generate", ["a b"], "'a b' belongs to no setting: write --prompt 'a b'"),
        ("generate", ["a", "b"], "'a' belongs to no setting: write --prompt 'a b'"),
        ("generate", ["a", "--exits", "e"], "'a' belongs to no setting: write --prompt a"),
        (
            "generate",
            ["--exits", "e", "a", "b", "--seed", "3"],
            "--exits takes one value, and 'a' is another one: write --prompt 'a b'",
        ),
        (
            "generate",
            ["--prompt", "a", "--exits=e", "b"],
            "--exits takes one value, and 'b' is another one: give settings as --name value",
        ),
        (
            "generate",
            ["--calibrated", "a b"],
            "--calibrated takes true, false or nothing, not 'a b': write --prompt 'a b'",
        ),
        ("serve", ["--exits=e", "80"], "and '80' is another one: give settings as --name value"),
        ("inspect", ["--trust-remote-code", "a"], "not 'a': give the path of one backbone"),
        ("tune", ["exits"], "'exits' belongs to no setting: give settings as --name value"),
        ("inspect", ["a", "b"], "'b' belongs to no setting"),
        ("inspect", [], "no path given: name the folder or hub id of one backbone or exits"),
        ("tune", ["--step", "3"], "unknown setting '--step'; did you mean --steps?"),
        ("tune", ["--foo", "3"], "unknown setting '--foo'; --help lists those that there are"),
        ("tune", ["--weight_decay", "0"], "'--weight_decay'; did you mean --weight-decay?"),
        (
            "inspect",
            ["--exits", "e"],
            "unknown setting '--exits'; --help lists those that there are",
        ),
        ("tune", ["--steps"], "--steps needs a value"),
        ("export", ["--eagle3"], "--eagle3 needs a value, one of 'speculators', 'sglang'"),
        ("export", ["--eagle3", "vllm"], "it must be one of 'speculators', 'sglang'"),
        ("tune", ["--steps", ""], "steps is '': it must be a whole number"),
        ("tune", ["--dynamic-weights", ""], "dynamic_weights is '': it must be true or false"),
        (
            "tune",
            ["--loss-weights", "1,2"],
            "loss_weights: '1,2' must be a number; several stand with spaces between them",
        ),
        ("tune", ["--layers", "--lr", "1"], "--layers needs a value"),
        ("tune", ["--layers"], "--layers needs a value"),
        ("generate", ["--prompt", "--x"], "one that begins with - is written --prompt=VALUE"),
        ("tune", ["--config"], "--config needs the name of a YAML file"),
        ("tune", ["--config=nowhere.yaml"], "cannot read the settings in nowhere.yaml: No such"),
        ("tune", ["--config=."], "cannot read the settings in .: Is a directory"),
    ],
)
def test_what_is_not_understood(command, args, message):
    with pytest.raises(UserError) as error:
        read(command, *args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Exits e, a backbone m and data d, to be named as from here."""
    for name, files in (("e", ["exit_config.json"]), ("m", ["config.json", "a.safetensors"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    (tmp_path / "d").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("generate", ["e", "--prompt", "x"], "'e' belongs to no setting: write --exits e"),
        ("suggest", ["m"], "'m' belongs to no setting: write --model m"),
        ("evaluate", ["--exits", "e", "d"], "'d' is another one: write --data d"),
        ("evaluate", ["--data", "d", "e"], "e is given with --data, and is exits: write --exits e"),
        ("calibrate", ["--data=d", "--data", "e"], "and is exits: write --exits e"),
        ("regenerate", ["--data", "d", "m"], "and is a backbone: write --model m"),
        ("suggest", ["--data", "m"], "m is given with --data, and is a backbone: write --model m"),
        ("tune", ["--valid-data", "m"], "m is given with --valid-data, and is a backbone"),
    ],
)
def test_a_folder_in_another_ones_place(folders, command, args, message):
    with pytest.raises(UserError) as error:
        check_folders(read(command, *args))
    assert message in str(error.value)


def test_folders_in_their_places(folders):
    check_folders(read("evaluate", "--data", "d", "hub/id", "--exits", "e", "--model", "m"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown setting 'stepz'; did you mean steps?"),
        ("steps: many", "steps is 'many': it must be a whole number"),
        ("lr: high", "lr is 'high': it must be a number"),
        ("resume: maybe", "resume is 'maybe': it must be true or false"),
        ("model: 5", "model is 5: it must be a text in quotation marks"),
        ("stage_layers: [a]", "stage_layers is 'a': it must be a list of whole numbers"),
        ("exit_vocab: lots", "exit_vocab is 'lots': it must be a whole number or 'auto'"),
        ("lr: 1\nlayers: [8\n", "is not valid YAML: did not find expected ',' or ']' in line 3, "),
        ("- steps", "holds no settings"),
        ("steps: &a [*a]", "steps is"),
        ("data: &a [*a]", "must be a list of single values"),
        ("x: &a [*a]", "unknown setting 'x'"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("steps: 3\nlr: 1\n'steps': 4", " line 3: steps is given twice, first in line 1"),
        ("data: a\nlayers: {4: 1,\n4: 2}", " line 3: 4 is given twice, first in line 2"),
        ("data: {a: 1}", "data is {'a': 1}: it must be a list of single values"),
        ("decay: slow", "decay is 'slow': it must be one of 'cosine', 'linear'"),
        ("min_lr: low", "min_lr is 'low': it must be a number or 'auto'"),
        (
            "layers: {a: 1}",
            "layers is {'a': 1}: it must be a text, a whole number or a list of whole numbers or "
            "texts",
        ),
    ],
)
def test_what_is_not_understood_in_yaml(text, message, yaml_file):
    file = yaml_file(text)
    for args in (["--config", file], [f"--config={file}", "--lr=1"]):
        with pytest.raises(UserError) as error:
            read("tune", *args)
        assert str(error.value).startswith(file)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_an_empty_value_in_yaml_is_the_default(yaml_file):
    assert read("tune", "--config", yaml_file("data:\nlr:\nsteps: 3\n")) == TuneConfig(steps=3)
    assert read("tune", "--config", yaml_file("# nothing\n")) == TuneConfig()


def run(*args, **changes):
    """A command in a process of its own."""
    command = [sys.executable, "-m", "ee_tuning", *args]
    environment = os.environ | changes
    return subprocess.run(command, capture_output=True, env=environment, timeout=PATIENCE)


def test_an_encoding_that_lacks_a_character(monkeypatch, tmp_path):
    """Help has ×, messages have –, texts have anything: what cannot be shown becomes a ?."""
    done = run("tune", "--help", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"dp ? tp ? pp" in done.stdout
    done = run("tune", "--config=h\u00e9.yaml", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert done.returncode == 2
    assert done.stderr.startswith(b"ee-tuning: cannot read the settings in h?.yaml: No such")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("ee_tuning.cli._overview", lambda: "\u4e16 \xe9")
    main([])
    assert stream.buffer.getvalue() == b"? \xe9\n"


@pytest.mark.parametrize(("args", "status"), [(["--help"], 1), (["tune", "--help"], 0)])
def test_a_reader_that_has_seen_enough(args, status):
    command = [sys.executable, "-m", "ee_tuning", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(PATIENCE) == status


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [("/dev/full", 1, b"ee-tuning: cannot write: No space left on device\n"), ("&-", 0, b"")],
)
def test_output_that_cannot_be_written(where, status, said):
    command = ["sh", "-c", f'exec "$@" >{where}', "sh", sys.executable, "-m", "ee_tuning", "--help"]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (status, said)


def test_ctrl_c_while_libraries_are_imported(tmp_path):
    (tmp_path / "torch.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "ee_tuning", "inspect", str(tmp_path)]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Of a test run in the background of a shell, processes ignore Ctrl-C unless told otherwise.
    usual = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(command, **pipes, env=environment, preexec_fn=usual)
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE)[1] == b"ee-tuning: stopped\n"
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["inspect", "./nowhere"], "backbone or exits ./nowhere"),
        (["tune", "--model", "./nowhere"], "backbone ./nowhere"),
        (["generate", "--exits=nowhere"], "exits nowhere"),
        (["tune", "--tokenizer=./nowhere"], "tokenizer ./nowhere"),
    ],
)
def test_a_mistyped_folder_is_said_before_anything_is_imported(args, what, tmp_path):
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run(*args, PYTHONPATH=path)
    line = f"ee-tuning: cannot read the {what}: there is no such folder; a hub id is"
    assert done.stderr.decode().startswith(line)
    assert done.returncode == 2


def test_several_processes_of_a_command_for_one_are_refused(tmp_path):
    done = run("inspect", str(tmp_path), WORLD_SIZE="2", RANK="1")
    said = b"ee-tuning: rank 1: inspect runs in one process: start it without torchrun\n"
    assert (done.returncode, done.stderr) == (2, said)
