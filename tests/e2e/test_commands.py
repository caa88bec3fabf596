"""The other commands, and what the README says of commands, files and symbols."""

import ast
import copy
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from helpers.commands import fails, tune

from ee_tuning.cli import COMMANDS, main
from ee_tuning.commands.evaluate import evaluate
from ee_tuning.config import EvaluateConfig
from ee_tuning.decode.text import encode_chat
from ee_tuning.errors import UserError
from ee_tuning.exit_config import parse_layers
from ee_tuning.parsing import parse

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def exits(base, data, tmp_path_factory):
    """Tuned exits, one per module of tests."""
    out = tmp_path_factory.mktemp("run") / "exits"
    tune(base, data, out, arch="mlp,layer")
    return out


def test_init_and_inspect(base, tmp_path, capsys):
    out = tmp_path / "exits"
    main(["init", "--model", base, "--layers", "1/2,1/1", "--arch", "norm,mlp", "--out", str(out)])
    assert "exits after layers [2, 4] saved in" in capsys.readouterr().out
    main(["inspect", str(out)])
    text = capsys.readouterr().out
    assert f"{300 * 32 + 32:,}" in text
    assert f"{300 * 32 + 32 + 3 * 32 * 48:,}" in text
    main(["inspect", base])
    assert "llama" in capsys.readouterr().out


def test_generate_prints_the_text_a_legend_and_the_depth(exits, capsys):
    flags = ["--exits", str(exits), "--prompt", "def function_1(", "--max-new-tokens", "12"]
    main(["generate", *flags, "--threshold", "0.05"])
    text = capsys.readouterr().out
    assert text.startswith("def function_1(")
    assert re.search(r"left at layer .*\(\d+%\)", text)
    assert re.search(r"\d+ tokens, mean depth \d\.\d of 4 layers", text)
    main(["generate", *flags, "--mode", "fixed", "--exit-layers", "3", "--do-sample"])
    assert "mean depth 3.0" in capsys.readouterr().out


def test_generate_reads_standard_input(exits, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f("))
    main(["generate", "--exits", str(exits), "--prompt", "-", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.startswith("def f(")


def test_evaluate_writes_numbers_that_fit(exits, data, capsys):
    main([
        "evaluate", "--exits", str(exits), "--data", data, "--thresholds", "1,0.1,0",
        "--seq-length", "32", "--max-tokens", "640", "--prompts", "2", "--prompt-length", "8",
        "--max-new-tokens", "6", "--rounds", "2", "--max-pending", "100",
    ])  # fmt: skip
    assert "agreement with full depth" in capsys.readouterr().out
    result = json.loads((exits / "evaluation.json").read_text())
    assert [row["layer"] for row in result["exit_rows"]] == [1, 3, 4]
    assert result["exit_rows"][-1]["agreement"] == 1
    rows = {row["threshold"]: row for row in result["threshold_rows"]}
    assert list(rows) == [1.0, 0.1, 0.0]
    full, always = rows[1.0], rows[0.0]
    assert full["text_agreement"] == full["next_token_agreement"] == 1
    assert full["mean_depth"] == full["next_token_depth"] == 4
    assert always["next_token_depth"] == 1
    assert always["next_token_agreement"] == pytest.approx(result["exit_rows"][0]["agreement"])
    assert always["shares"] == {"1": pytest.approx(5 / 6), "3": 0, "4": pytest.approx(1 / 6)}
    assert all(sum(row["shares"].values()) == pytest.approx(1) for row in rows.values())
    page = (exits / "report.html").read_text()
    assert page.count("<svg") == 4
    assert not re.search(r'(src|href)="https?:', page)


def test_evaluated_losses_are_those_of_the_forward_pass(exits, base, data):
    import torch

    from ee_tuning import EarlyExitModel
    from ee_tuning.config import EvaluateConfig
    from ee_tuning.data import collate, load_packed
    from ee_tuning.evaluate.exits import measure_exits
    from ee_tuning.loading import load_tokenizer

    model = EarlyExitModel.from_pretrained(str(exits))
    packed = load_packed([data], load_tokenizer(base), 32, 0)
    config = EvaluateConfig(seq_length=32, max_tokens=4 * 32, micro_batch_size=2)
    rows = measure_exits(model, packed, config, [1.0])["exit_rows"]
    batch = collate(packed, [0, 1, 2, 3])
    with torch.no_grad():
        expected = model(**batch).exit_losses
    for row in rows[:-1]:
        assert row["loss"] == pytest.approx(expected[row["layer"]].item(), rel=1e-5)


SMALL = [
    "--seq-length", "32", "--max-tokens", "64", "--prompts", "1", "--prompt-length", "8",
    "--max-new-tokens", "2", "--rounds", "1", "--thresholds", "1,0.5",
]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(exits, data, monkeypatch):
    """A folder is there, but nothing can be made in it."""
    monkeypatch.setattr("ee_tuning.commands.evaluate.load_for_decoding", None)
    config = EvaluateConfig(exits=str(exits), data=[data], out="/proc/self")
    with pytest.raises(UserError, match=r"cannot write to /proc/self: .*; choose another --out"):
        evaluate(config)


def test_what_was_measured_is_shown_even_if_it_cannot_be_written(exits, data, capsys, monkeypatch):
    def full(path, value):
        raise UserError("could not write: no space left")

    monkeypatch.setattr("ee_tuning.commands.evaluate.write_json", full)
    with pytest.raises(SystemExit):
        main(["evaluate", "--exits", str(exits), "--data", data, *SMALL])
    captured = capsys.readouterr()
    assert "agrees with final exit" in captured.out
    assert "agreement with full depth" in captured.out
    assert captured.err.endswith("ee-tuning: could not write: no space left\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["evaluate", "--exits", "nowhere", "--data", "DATA"],
            "exits nowhere: there is no such folder",
        ),
        (["generate", "--prompt", "x"], "no exits given"),
        (["generate", "--exits", "EXITS"], "prompt is empty"),
        (["generate", "--exits", "EXITS", "--prompt", "x", "--threshold", "2"], "outside [0, 1]"),
        (["generate", "--exits", "EXITS", "--prompt", "x", "--mode", "slow"], "mode"),
        (["generate", "--exits", "EXITS", "--prompt", "x" * 500], "context is 128"),
        (["generate", "--exits", "EXITS", "--prompt", "x", "--chat"], "no chat template"),
        (
            ["generate", "--exits", "EXITS", "--prompt", "x", "--exit-layers", "2"],
            "no exit at layer 2",
        ),
        (
            ["generate", "--exits", "EXITS", "--prompt", "x", "--threshold", "2:0.5"],
            "threshold for layer 2",
        ),
        (
            ["generate", "--exits", "EXITS", "--prompt", "x", "--threshold", "high"],
            "not understood",
        ),
        (
            ["generate", "--exits", "EXITS", "--prompt", "x", "--max-new-tokens", "0"],
            "must be greater than 0",
        ),
        (
            ["generate", "--exits", "EXITS", "--prompt", "x", "--do-sample", "--temperature", "0"],
            "strictly positive",
        ),
        (
            ["generate", "--exits", "EXITS", "--prompt", "x", "--stop-strings", ""],
            "stop string is empty",
        ),
        (["generate", "--exits", "EXITS", "--stop-strings", "a", "b c"], "'b c' is a stop string"),
        (
            ["generate", "--exits", "EXITS", "--prompt", "x", "--max-new-tokens", "9000000000"],
            "GiB free",
        ),
        (["evaluate", "--exits", "EXITS"], "no data given"),
        (
            ["evaluate", "--exits", "EXITS", "--data", "DATA", "--thresholds", "1.2"],
            "outside [0, 1]",
        ),
        (["evaluate", "--exits", "EXITS", "--data", "DATA", "--thresholds", "a"], "not numbers"),
        (
            ["evaluate", "--exits", "EXITS", "--data", "nowhere.txt", "--seq-length", "64"],
            "does not exist",
        ),
        (["evaluate", "--exits", "EXITS", "--data", "DATA"], "beyond the backbone's context of"),
        (
            ["init", "--model", "BASE", "--layers", "2", "--out", "EXITS"],
            "is not empty: replace it with --overwrite or",
        ),
        (["generate", "--exits", "EXITS", "--prompt", "caf\udce9"], "not in UTF-8"),
        (["generate", "--exits", "EXITS", "--prompt", "x", "--min-depth", "9"], "no exit active"),
        (["init", "--model", "BASE", "--layers", "2", "--out", "/proc/x"], "cannot write"),
        (["inspect", "/nowhere"], "cannot read the backbone"),
        (["tunee"], "did you mean tune?"),
    ],
)
def test_bad_calls(args, message, exits, base, data, capsys):
    places = {"EXITS": exits, "BASE": base, "DATA": data}
    assert message in fails(capsys, *[places.get(arg, arg) for arg in args])


def test_thresholds_per_exit_in_yaml(exits, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"exits: {exits}\nprompt: x\nthreshold: {{3: 0.2, 2: 0.5}}\n")
    assert "threshold for layer 2" in fails(capsys, "generate", "--config", settings)


def test_a_chat_template_that_fails_is_one_line(tokenizer):
    tokenizer = copy.copy(tokenizer)
    for template in ("{{ raise_exception('no such role') }}", "{% for"):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match="the tokenizer's chat template fails: "):
            encode_chat(tokenizer, [{"role": "user", "content": "x"}])


def test_a_file_that_is_no_chat_template_is_refused_before_anything(exits, tmp_path, capsys):
    file = tmp_path / "template.jinja"
    file.write_text("{{ bos_token }}\n{% for message in messages %}")
    given = ["generate", "--exits", exits, "--prompt", "x", "--chat", "--chat-template", file]
    assert f"chat template {file}, line 2: " in fails(capsys, *given)
    file.write_text("{{ raise_exception('not these roles') }}")  # it may like others
    assert "the tokenizer's chat template fails: not these roles" in fails(capsys, *given)


def test_help_names_every_setting(capsys):
    main(["--help"])
    overview = capsys.readouterr().out
    for name, config_class in COMMANDS.items():
        assert name in overview
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for field in config_class.__dataclass_fields__:
            assert field.replace("_", "-") in text


def test_readme_commands_are_understood():
    commands = re.findall(r"^ee-tuning (.*)$", README, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        name, *args = shlex.split(command)
        parse(name, COMMANDS[name], args)


def test_readme_python_runs(tmp_path, monkeypatch):
    import torch

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    code = code.replace("demo/model", str(ROOT / "demo/model")).replace("=64)", "=4)")
    exec(code, {"input_ids": torch.tensor([[5, 6, 7]])})


def test_readme_files_and_symbols_exist():
    pairs = re.findall(r"`(src/[\w/]+\.py)`\s+–\s+`(\w+)`(?:\s+and\s+`(\w+)`)?", README)
    assert len(pairs) >= 10
    for path, *symbols in pairs:
        names = {
            node.name
            for node in ast.parse((ROOT / path).read_text()).body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        }
        assert {symbol for symbol in symbols if symbol} <= names, path
    for link in re.findall(r"\]\(([\w/]+\.md)\)", README):
        assert (ROOT / link).is_file(), link


def test_demo_settings_are_understood(monkeypatch):
    for name, command in (("run", "tune"), ("evaluate", "evaluate")):
        path = ROOT / "demo" / f"{name}.yaml"
        parse(command, COMMANDS[command], ["--config", str(path)])
        assert yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("layers: 8", "layers", [8]),
        ("layers: [8, 1/2]", "layers", [8, 16]),
        ("layers: 4,every:16", "layers", [4, 16, 32]),
    ],
)
def test_layers_in_yaml(text, key, value, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = parse("tune", COMMANDS["tune"], ["--config", str(path)])
    assert parse_layers(getattr(config, key), 32) == value


@pytest.mark.parametrize(("flag", "value"), [("8", [8]), ("8,16", [8, 16]), ("1/4,every:8", None)])
def test_layers_as_flags(flag, value):
    config = parse("tune", COMMANDS["tune"], ["--layers", flag])
    if value is None:
        with pytest.raises(UserError, match="given twice"):
            parse_layers(config.layers, 32)
    else:
        assert parse_layers(config.layers, 32) == value
