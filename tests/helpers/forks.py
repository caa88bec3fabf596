"""Processes that start at once: forked from one that has imported everything and done nothing.

One that starts anew imports for five seconds. What is about imports, or about the interpreter's
start, has to start one: `subprocess`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers import imported

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "ee_tuning.tune.loop", "ee_tuning.commands.generate", "ee_tuning.commands.evaluate",
    "torch.distributed.run", "helpers.launch_decoding", "helpers.launch_shared",
    "helpers.launch_tuning", "helpers.struck",
]  # fmt: skip


class Forked:
    """A process, with what tests use of `subprocess.Popen`."""

    def __init__(self, process: Any, said: Path):
        self._process, self._said = process, said

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def said(self) -> str:
        """What it has printed so far, on stdout or stderr."""
        return self._said.read_text()

    @property
    def returncode(self) -> int | None:
        """Its status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its status, once it has ended; after so many seconds it is killed, the test fails."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            pytest.fail(f"it did not end in {timeout} s: {self.said[-2000:]}")
        return self._process.exitcode


def fork(
    said: Path,
    target: Callable,
    *args: Any,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Forked:
    """Start `target(*args)` as a process that prints to the file `said`.

    env: what it has beside this process's environment. cwd: where it works.
    """
    _serve()
    given = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | dict(env or {})
    process = _CONTEXT.Process(target=_run, args=(said, given, cwd, target, args))
    process.start()
    return Forked(process, said)


def torchrun(number: int, restarts: int, target: Callable, *args: Any) -> None:
    """torchrun itself, but that its ranks, `target(*args)` each, are forked from this process."""
    run = importlib.import_module("torch.distributed.run")
    made = run.config_from_args

    def config(given: Any) -> tuple:
        settings, *_ = made(given)
        settings.start_method = "fork"
        return settings, target, args

    run.config_from_args = config
    flags = ["--standalone", f"--nproc-per-node={number}", f"--max-restarts={restarts}"]
    run.main([*flags, "no-script"])


def _serve() -> None:
    """Let the process that is forked be there. It finds modules by way of its environment."""
    before = dict(os.environ)
    found_in = [str(Path(__file__).parents[1]), *sys.path]
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(filter(None, found_in)))
    try:
        _CONTEXT.set_forkserver_preload(_IMPORTED)
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(said: Path, env: dict, cwd: Path | None, target: Callable, args: tuple) -> None:
    imported()
    os.environ.clear()
    os.environ.update(env)
    with said.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if cwd is not None:
        os.chdir(cwd)
    target(*args)
