"""A mistake is one line on stderr, and nothing beside it: no progress, no warning but of code that
was run."""

import warnings
from contextlib import nullcontext

import pytest
from helpers.commands import arguments

from ee_tuning.cli import main
from ee_tuning.commands import plan
from ee_tuning.errors import Notice, SecurityNotice, UserError, all_checked


@pytest.fixture(scope="module")
def places(base, data, tmp_path_factory):
    """Names for what commands are given: some of it is there and does, some is a mistake."""
    folder = tmp_path_factory.mktemp("places")
    exits = folder / "exits"
    main(["init", "--model", str(base), "--layers", "1,3", "--arch", "norm", "--out", str(exits)])
    (folder / "wrong").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    (folder / "short.txt").write_text("def")
    (folder / "bad.jsonl").write_text('{"text": 1}\n')
    return {"BASE": base, "DATA": data, "EXITS": exits} | {
        name.upper(): folder / place
        for name, place in [
            ("nowhere", "nowhere.jsonl"), ("wrong", "wrong"), ("full", "full"),
            ("short", "short.txt"), ("bad", "bad.jsonl"), ("out", "out"), ("own", "own.jsonl"),
            ("below", "short.txt/found.json"),
        ]
    }  # fmt: skip


# Settings that are ignored, or an address that all can reach, are told of where all else is right.
IGNORED = "--mode full --threshold 0.5"
TUNE = " ".join(["tune", *arguments("BASE", None, "OUT", kl_weight="0.3")])
EVERYONE = "serve --exits EXITS --host 0.0.0.0"
MISTAKES = [
    f"{TUNE} --data NOWHERE",
    f"{TUNE} --data DATA --log-to wandb",
    f"{TUNE} --data SHORT",
    f"{TUNE} --data DATA --out FULL",
    f"{TUNE} --data DATA --model WRONG",
    f"{TUNE} --data DATA --seq-length 100000",
    f"{TUNE} --data DATA --timeout 0",
    f"{TUNE} --data NOWHERE --backbone-precision fp8",
    "evaluate --exits EXITS --data SHORT --prompt-length 8 --seq-length 32 --out OUT",
    f"generate --exits WRONG --prompt a {IGNORED}",
    f"generate --exits EXITS --prompt a {IGNORED} --system x",
    f"generate --exits EXITS --prompt a {IGNORED} --max-new-tokens 0",
    f"generate --exits EXITS --prompt a {IGNORED} --timeout 1e30",
    f"generate --exits EXITS --prompt a {IGNORED} --max-new-tokens 99999999",
    "generate --exits EXITS --prompt a --temperature 2 --max-new-tokens 0",
    "calibrate --exits EXITS --data DATA --max-new-tokens 1000000",
    "calibrate --exits EXITS --data SHORT",
    "calibrate --exits EXITS --data DATA --timeout 0",
    "regenerate --model BASE --data BAD --tokens 50 --out OWN",
    "regenerate --model BASE --tokens 50 --out /proc/self/own.jsonl",
    "regenerate --model BASE --tokens 50 --out OWN --timeout -1",
    "suggest --model BASE --data NOWHERE",
    "suggest --model BASE --data SHORT",
    "suggest --model BASE --data BAD",
    "suggest --model BASE --minutes 0.01 --out FULL",
    "suggest --model BASE --minutes 0.01 --out BELOW",
    "suggest --model BASE --minutes 0.01 --out BAD",
    "suggest --model BASE --minutes 0.01 --out /proc/self/found.json",
    "evaluate --exits EXITS --data DATA --seq-length 64 --exit-layers 2 --out OUT",
    "generate --exits EXITS --prompt a --max-pending 0",
    "generate --exits EXITS --prompt a --mode speculative --max-pending 0",
    "generate --exits EXITS --prompt a --device foo",
    "serve --exits EXITS --port 0 --max-pending 0",
    "serve --model BASE --port 0 --max-pending 0",
    "serve --exits EXITS --host bad.host.name",
    "serve --exits EXITS --host 192.0.2.1",
    "serve --exits WRONG --host 0.0.0.0 --port 0",
    f"{EVERYONE} --port 0 --mode fixed",
    f"{EVERYONE} --port 0 --capacity 1000000",
    f"{EVERYONE} --port 0 --threshold 3",
    "init --model WRONG --layers 1 --out OUT",
    "init --model BASE --layers 1 --out FULL",
    "export --exits EXITS --layer 2 --out OUT",
    "export --exits EXITS --layer 1 --out FULL",
    "inspect WRONG",
    "plan --model BASE --layers 99",
]


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_has_its_line_alone(line, places, capfd):
    words = [str(places.get(word, word)) for word in line.split()]
    with warnings.catch_warnings(record=True) as told, pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("ee-tuning: ")
    assert not [str(one.message) for one in told if issubclass(one.category, Notice)]


def told_of(monkeypatch, *steps):
    """The warnings that are shown where a command warns of an ignored setting and does `steps`."""

    def command(config):
        warnings.warn("ignored", Notice, stacklevel=1)
        for step in steps:
            step()

    monkeypatch.setattr(plan, "plan", command)
    with (
        warnings.catch_warnings(record=True) as told,
        pytest.raises(SystemExit) if refuse in steps else nullcontext(),
    ):
        main(["plan"])
    return [str(one.message) for one in told]


def run_code():
    warnings.warn("code is run", SecurityNotice, stacklevel=1)


def refuse():
    raise UserError("a mistake")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([refuse], []),
        ([run_code, refuse], ["code is run"]),
        ([all_checked, refuse], ["ignored"]),
        ([run_code, all_checked], ["code is run", "ignored"]),
        ([all_checked, run_code], ["ignored", "code is run"]),
        ([run_code], ["code is run", "ignored"]),
    ],
)
def test_notices_wait_until_nothing_is_left_to_refuse(steps, said, monkeypatch):
    """In every command. What cannot be undone is told at once."""
    assert told_of(monkeypatch, *steps) == said
