"""The shape of the house: who may import whom, how long a page is, how many pages a step takes."""

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers.families import tiny
from helpers.models import early_exit
from helpers.prompts import prompt
from helpers.source import FILES, ROOT, circles, files_run, imports, room, tree

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.config import Measure, Mode, TuneConfig
from ee_tuning.decode import Engine, Request, Threshold
from ee_tuning.decode.settings import POLICIES
from ee_tuning.exit_config import Arch
from ee_tuning.exits import ARCHS
from ee_tuning.losses import confidence
from ee_tuning.tune.optimizers import build_optimizers
from ee_tuning.tune.step import Tuner

# From the top. A room imports rooms of its own floor and of those below.
FLOORS = [
    ["__main__", "lm_eval"],
    ["cli"],
    ["commands", "parsing"],
    ["__init__"],
    ["api"],
    ["suggest"],
    ["calibrate", "regenerate", "serve", "tune", "evaluate", "plan", "decode"],
    ["share", "export"],
    ["adapter"],
    ["parallel"],
    ["stages", "costs", "passes"],
    ["model", "invariant"],
    ["exits", "backbone", "loading", "fingerprint", "gguf", "grouped"],
    ["quantise", "data", "vocabulary", "varlen", "devices", "losses", "slices", "own_code"],
    ["config", "tune_config", "exit_config", "files", "folders", "hub", "certificate"],
    ["attention", "twin", "errors", "settings", "version", "collectives", "peers"],
]
HOME = Path(__file__).parents[2]
README = (HOME / "README.md").read_text(encoding="utf-8")


def test_files_do_not_import_each_other_in_circles():
    assert circles({file: imports(file) for file in FILES}) == []


def test_rooms_do_not_import_each_other_in_circles():
    graph = {room(file): set() for file in FILES}
    for file in FILES:
        graph[room(file)] |= {room(other) for other in imports(file)} - {room(file)}
    assert circles(graph) == []


SCRIPTS = sorted([*HOME.glob("demo/*.py"), *HOME.glob("benchmarks/*.py")])


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_scripts_import_what_there_is(file):
    """They run in no test whole, but what they take from the package must not be gone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ee_tuning"):
            module = importlib.import_module(node.module)
            for name in node.names:
                there = hasattr(module, name.name)
                assert there or find_spec(f"{node.module}.{name.name}"), name.name


def test_every_room_has_its_floor():
    floors = [name for floor in FLOORS for name in floor]
    assert sorted(floors) == sorted({room(file) for file in FILES})


def test_imports_run_downwards():
    level = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    upwards = [
        f"{file} imports {other}"
        for file in FILES
        for other in sorted(imports(file))
        if level.get(room(other), 99) < level.get(room(file), 99)
    ]
    assert upwards == []


def test_commands_alone_print():
    """And the command line, of mistakes and itself."""
    speaks = {"print", "Console", "Table", "Progress"}
    found = [
        f"{file}: {node.func.id}"
        for file in FILES
        if room(file) not in ("commands", "cli")
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in speaks
    ]
    assert found == []


def test_no_file_is_longer_than_400_lines():
    lengths = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {file: lines for file, lines in lengths.items() if lines > 400} == {}


def test_no_function_is_longer_than_60_lines():
    long = [
        f"{file}: {node.name}"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > 60
    ]
    assert long == []


def test_no_import_is_for_type_checkers_alone():
    named = [file for file in FILES if "TYPE_CHECKING" in (ROOT / file).read_text(encoding="utf-8")]
    assert named == []


def public(body):
    """Functions and classes that have a name of their own; those of classes, too."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


def test_what_is_public_says_what_it_is():
    silent = [file for file in FILES if not ast.get_docstring(tree(file))]
    silent += [
        f"{file}: {node.name}"
        for file in FILES
        for node in public(tree(file).body)
        if not ast.get_docstring(node)
    ]
    assert silent == []


# -- pages that are turned -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def files_of_a_step():
    """What the second tuning step runs: one process, two micro-batches, two exits."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,3", arch="mlp"))
    tuner = Tuner(model, build_optimizers(model, TuneConfig()), clip=1.0)
    ids = [torch.tensor([prompt(16, seed)]) for seed in (1, 2)]
    batches = [
        {"input_ids": one, "labels": one, "position_ids": torch.arange(16)[None]} for one in ids
    ]

    def step():
        tuner.step(batches, {1: 1.0, 3: 1.0})

    step()
    return files_run(step)


@pytest.fixture(scope="module")
def files_of_8_tokens():
    """What 8 tokens run which leave at several layers, after some have been at each."""
    engine = Engine(early_exit(), [1, 2, 3], capacity=64)
    policy = Threshold(4, dict.fromkeys([1, 2, 3], 0.02), max_pending=3)
    request = Request(prompt(5), policy, 30)
    stream, layers = engine.stream([request]), []
    for _ in range(8):
        next(stream)
    found = files_run(lambda: layers.extend(next(stream)[1].exit_layer for _ in range(8)))
    assert len(set(layers)) > 1
    stream.close()
    return found


def test_a_tuning_step_runs_few_files(files_of_a_step):
    assert len(files_of_a_step) <= 7, sorted(files_of_a_step)


def test_8_decoded_tokens_run_few_files(files_of_8_tokens):
    """Five that decide, six that compute, and three of the exits."""
    assert len(files_of_8_tokens) <= 14, sorted(files_of_8_tokens)


def listed(start, end):
    """The files that the README names, in order, between two of its words."""
    text = README.split("## Read the code in this order")[1].split(start)[1].split(end)[0]
    return re.findall(r"`src/ee_tuning/([\w/]+\.py)`", text)


def test_the_readme_lists_what_a_tuning_step_runs(files_of_a_step):
    assert sorted(listed("One tuning step", "One decoding step")) == sorted(files_of_a_step)


def test_the_readme_lists_what_8_decoded_tokens_run(files_of_8_tokens):
    assert sorted(listed("One decoding step", "Several processes")) == sorted(files_of_8_tokens)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name):
    root = Path(__file__).parents[2]
    text = (root / name).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:src|tests|docs|benchmarks)/[\w/]+\.\w+)`", text)
    assert len(paths) > 5
    assert [path for path in paths if "NAME" not in path and not (root / path).exists()] == []


def test_every_choice_has_its_class():
    """What a setting can be is what there is."""
    assert {*get_args(Arch)} == {*ARCHS}
    assert {*get_args(Mode)} == {*POLICIES}
    logits = torch.randn(2, 9)
    assert len({confidence(logits, measure).sum().item() for measure in get_args(Measure)}) == 3


# -- the reader of imports itself ----------------------------------------------------------------


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"d"}, "e": {"a"}}
    assert circles(graph) == [["b", "c"]]


def test_imports_within_functions_are_seen():
    assert "commands/tune.py" in FILES
    assert imports("__main__.py") == {"cli.py"}
    assert {"exit_config.py", "errors.py"} < imports("__init__.py")
    assert imports("errors.py") == set()
