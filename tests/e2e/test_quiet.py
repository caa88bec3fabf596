"""Nothing but the project's own lines is on stderr, whatever libraries say on the way."""

import re
import subprocess
import sys

import pytest

# Each command after a line that names it, then with a mistake; --help first.
SCRIPT = """\
import os, sys, warnings
without, base, data, out = sys.argv[1:]
if without:
    sys.modules[without] = None
from ee_tuning.cli import main

def run(name, *args):
    os.write(2, f"# {name}\\n".encode())
    try:
        main([name, *args])
    except SystemExit as stop:
        os.write(2, f"status {stop.code}\\n".encode())

small = ["--seq-length", "32", "--micro-batch-size", "2"]
exits = ["--exits", f"{out}/tuned"]
for name, args in {
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
}.items():
    run(name, "--help")
    run(name, *args)
    run(name, *args, "--no-such-setting")
run("export", *exits, "--merge", "--out", f"{out}/merged")
"""
HELPED = "status 0"
MISTAKEN = ["ee-tuning: unknown setting '--no-such-setting'", "status 2"]
FP8 = "ee-tuning: warning: --backbone-precision fp8: cpu has no fp8 matrix units, .*"
IGNORED = "ee-tuning: warning: temperature, top_k and top_p are ignored without do_sample"
LOSSES = "exit 1 [0-9.]+  exit 3 [0-9.]+"
STEP = r"step {}  [0-9,]+ tok/s  loss 1:[0-9.]+ 3:[0-9.]+"
TUNED = [FP8, f"held-out loss at step 0: {LOSSES}", STEP.format(2), STEP.format(4),
         f"held-out loss at step 4: {LOSSES}"]  # fmt: skip


@pytest.mark.parametrize("without", ["", pytest.param("torchao", marks=pytest.mark.slow)])
def test_only_own_lines_are_on_stderr(without, base, data, tmp_path):
    command = [sys.executable, "-c", SCRIPT, without, base, data, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    parts = dict.fromkeys(re.findall("^# (.*)", done.stderr, re.MULTILINE), "")
    found = [part.splitlines() for part in done.stderr.split("# ")[1:]]
    said = {"tune": TUNED, "generate": [IGNORED]}
    expected = []
    for name in parts:
        expected += [[name, HELPED], [name, *said.get(name, [])], [name, *MISTAKEN]]
    expected.append(["export"])
    # The last lines of `tune` are a table.
    found = [[line for line in lines if not re.match(r"[ ┏┡├└┃│╇]", line)] for lines in found]
    assert len(found) == len(expected)
    for lines, patterns in zip(found, expected, strict=True):
        assert len(lines) == len(patterns), lines
        assert all(map(re.fullmatch, patterns, lines)), lines
