"""The command line: which command runs, and how it ends. `parsing` reads its settings.

A command is a function of its name in `ee_tuning.commands`, which is imported when it runs.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import logging
import os
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Iterator

from ee_tuning import config as settings
from ee_tuning.calibrate.config import CalibrateConfig
from ee_tuning.errors import Interrupted, Notice, ProcessFailed, UserError, mistakes_first
from ee_tuning.files import empty_folders_go
from ee_tuning.regenerate.config import RegenerateConfig
from ee_tuning.serve.config import ServeConfig
from ee_tuning.suggest.config import SuggestConfig

COMMANDS: dict[str, type] = {
    "init": settings.InitConfig,
    "tune": settings.TuneConfig,
    "plan": settings.PlanConfig,
    "generate": settings.GenerateConfig,
    "evaluate": settings.EvaluateConfig,
    "calibrate": CalibrateConfig,
    "export": settings.ExportConfig,
    "inspect": settings.InspectConfig,
    "regenerate": RegenerateConfig,
    "serve": ServeConfig,
    "suggest": SuggestConfig,
}


def main(args: list[str] | None = None) -> None:
    """Run a subcommand. A user's mistake is one line and exit status 2."""
    args = sys.argv[1:] if args is None else list(args)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal's encoding lacks becomes a ?
            stream.reconfigure(errors="replace")
    with ends_in_a_line(debug), contextlib.nullcontext() if debug else _own_lines_alone():
        _run(args)


@contextlib.contextmanager
def ends_in_a_line(debug: bool = False) -> Iterator[None]:
    """Inside, a user's mistake ends the process with one line and exit status 2; so does what else
    is nobody's fault, with another status."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # it may have been closed at the start
                sys.stdout.flush()
    except UserError as error:
        _fail(str(error), debug, 2)
    except ProcessFailed as error:
        _fail(str(error), debug, 1)
    except Interrupted as error:
        _fail(str(error), debug, 130)
    except KeyboardInterrupt:
        _fail("stopped", debug, 130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        if error.errno == errno.ENOSPC:
            _fail(f"cannot write: {error.strerror}", debug, 1)
        raise SystemExit(1) from None  # who read the output has seen enough


@contextlib.contextmanager
def _own_lines_alone() -> Iterator[None]:
    """Inside, of warnings and logs only this project's own are shown."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.formatwarning = lambda text, *_, **__: f"ee-tuning: warning: {text}\n"
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", Notice)
            yield
    finally:
        logging.disable(disabled)


def _fail(message: str, debug: bool, status: int) -> typing.NoReturn:
    if debug:
        traceback.print_exc()
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    text = message if processes == 1 or message.startswith("rank") else f"rank {rank}: {message}"
    print(f"ee-tuning: {text}", file=sys.stderr, flush=True)
    if processes > 1:
        os._exit(status)  # what waits for other processes, perhaps for ever, is not waited for
    raise SystemExit(status)


def _run(args: list[str]) -> None:
    from ee_tuning.parsing import (  # here, so that Ctrl-C meanwhile is one, too
        check_folders,
        nearest,
        parse,
    )

    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return
    if args[0] == "--version":
        from ee_tuning import __version__

        print(__version__)
        return
    if args[0] not in COMMANDS:
        raise UserError(
            f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)}; see ee-tuning --help"
        )
    name = args[0]
    config = parse(name, COMMANDS[name], args[1:])
    check_folders(config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not hasattr(config, "tp"):
        raise UserError(f"{name} runs in one process: start it without torchrun")
    command = getattr(_module(f"ee_tuning.commands.{name}"), name)
    with mistakes_first(), empty_folders_go():
        command(config)


def _module(name: str) -> types.ModuleType:
    """A command's module, imported with the garbage collector off.

    It brings objects by the hundred thousand, which stay to the end: looking through them again and
    again took a quarter of the start, and would take a quarter of a second at each collection.
    """
    if name in sys.modules:
        return sys.modules[name]
    enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _overview() -> str:
    lines = ["usage: ee-tuning COMMAND [--config FILE.yaml] [--FLAG VALUE ...]", ""]
    lines += [f"  {name:12}{config_class.__doc__}" for name, config_class in COMMANDS.items()]
    lines += ["", "ee-tuning COMMAND --help lists the flags; --debug shows tracebacks."]
    return "\n".join(lines)
