"""Nothing but the project's own lines is on stderr, whatever libraries say on the way."""

import re
import subprocess
import sys

import pytest

from ee_tuning.cli import COMMANDS

# Each command's help, the command itself, and a mistake, each after a line that names it.
SCRIPT = """\
import os, sys
without, base, data, out = sys.argv[1:]
if without:
    sys.modules[without] = None
from ee_tuning.cli import COMMANDS, main

def run(name, *args):
    os.write(2, f"# {name}\\n".encode())
    try:
        main([name, *args])
    except SystemExit as stop:
        os.write(2, f"status {stop.code}\\n".encode())

small = ["--seq-length", "32", "--micro-batch-size", "2"]
exits = ["--exits", f"{out}/tuned"]
runs = {
    "init": ["--model", base, "--layers", "2", "--out", f"{out}/new"],
    "tune": ["--model", base, "--layers", "1,3", "--arch", "layer", "--data", data, "--steps", "4",
             "--global-batch-size", "4", "--save-every", "2", "--log-every", "2", *small,
             "--backbone-precision", "fp8", "--out", f"{out}/tuned"],
    "plan": ["--model", base, "--layers", "2", *small],
    "generate": [*exits, "--prompt", "def f(", "--max-new-tokens", "4", "--top-k", "5"],
    "evaluate": [*exits, "--data", data, "--thresholds", "1,0.5", "--prompts", "1", *small,
                 "--prompt-length", "8", "--max-new-tokens", "4", "--rounds", "1"],
    "export": [*exits, "--layer", "3", "--out", f"{out}/exported"],
    "inspect": [base],
    "regenerate": ["--model", base, "--data", data, "--tokens", "60", "--slots", "2",
                   "--max-new-tokens", "8", "--out", f"{out}/own.jsonl"],
}
for name in [*runs, *(COMMANDS.keys() - runs.keys())]:
    run(name, "--help")
    if name in runs:
        run(name, *runs[name])
    run(name, *runs.get(name, []), "--no-such-setting")
run("export", *exits, "--merge", "--out", f"{out}/merged")
"""
HELPED = "status 0"
MISTAKEN = [
    "ee-tuning: unknown setting '--no-such-setting'; --help lists those that there are",
    "status 2",
]
LOSSES = "exit 1 [0-9.]+  exit 3 [0-9.]+"
DATA = "data: 61 records, [0-9,]+ tokens, .*"
SAID = {  # by commands that work
    "evaluate": [DATA],
    "generate": ["ee-tuning: warning: temperature, .* are ignored without do_sample"],
    "regenerate": ["writing 60 tokens of texts, 100% from .*", "[0-9,]+ of 60 tokens"],
    "tune": [
        "ee-tuning: warning: --backbone-precision fp8: cpu has no fp8 matrix units, .*",
        DATA,
        rf"held-out loss at step \d: {LOSSES}",
        r"step \d  [0-9,]+ tok/s  loss 1:[0-9.]+ 3:[0-9.]+",
        "[ ┏┡├└┃│╇].*",  # a table
    ],
}


@pytest.mark.parametrize("without", ["", pytest.param("torchao", marks=pytest.mark.slow)])
def test_only_own_lines_are_on_stderr(without, base, data, tmp_path):
    command = [sys.executable, "-c", SCRIPT, without, base, data, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seen = set()
    for name, *lines in (part.splitlines() for part in done.stderr.split("# ")[1:]):
        assert lines in ([HELPED], MISTAKEN) or all(
            any(re.fullmatch(pattern, line) for pattern in SAID.get(name, [])) for line in lines
        ), f"{name}: {lines}"
        seen.add((name, lines[0] if lines else ""))
    for name in COMMANDS:
        assert {(name, HELPED), (name, MISTAKEN[0])} <= seen
    assert ("export", "") in seen
