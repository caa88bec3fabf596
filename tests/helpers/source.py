"""The package's own source: what its files import, and which of them a call runs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import ee_tuning

ROOT = Path(ee_tuning.__file__).parent
# Every file, below `ROOT`, as "tune/step.py".
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


@cache
def tree(file: str) -> ast.Module:
    """The syntax tree of one of `FILES`."""
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def room(file: str) -> str:
    """The folder that a file is in, or its own name: "tune/step.py" is in "tune"."""
    return file.split("/")[0].removesuffix(".py")


def imports(file: str) -> set[str]:
    """The other files that one imports, anywhere in it: within functions, too."""
    return {found for name in _imported(tree(file)) for found in [_file(name)] if found != file}


def _imported(module: ast.Module) -> Iterator[str]:
    """Names of modules, of this package alone, that a module imports."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "ee_tuning")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import is not followed here"
            if (node.module or "").split(".")[0] == "ee_tuning":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if _file(inner, None) else str(node.module)


def _file(module: str, otherwise: str | None = "") -> str | None:
    """The file of a module by its dotted name; `otherwise`, unless empty, where there is none."""
    path = "/".join(module.split(".")[1:])
    for file in (f"{path}.py", f"{path}/__init__.py".removeprefix("/")):
        if file in FILES:
            return file
    assert otherwise is None, f"there is no module {module}"
    return None


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes each of which is reached from each other one."""
    below = {node: reached(graph, node) for node in graph}
    groups = {
        tuple(sorted({other for other in below[node] if node in below[other]} | {node}))
        for node in graph
    }
    return sorted(list(group) for group in groups if len(group) > 1)


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Every node that arrows lead to from `start`."""
    found: set[str] = set()
    open_nodes = [start]
    while open_nodes:
        new = graph[open_nodes.pop()] - found
        found |= new
        open_nodes += new
    return found


def files_run(call: Callable[[], object]) -> set[str]:
    """The files whose functions are called while `call` runs, in this thread."""
    codes: set[str] = set()

    def note(frame, event, _):
        if event == "call":
            codes.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    paths = {Path(name) for name in codes}
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT)}
