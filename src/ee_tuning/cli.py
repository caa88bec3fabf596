"""The command line: which command, with which settings. Settings and their help are in `config`.

A command is a function of its name in `ee_tuning.commands`, which is imported when it runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import sys
import traceback
import typing
import warnings
from pathlib import Path
from typing import Any

from ee_tuning import config as settings
from ee_tuning.errors import Interrupted, ProcessFailed, UserError

COMMANDS: dict[str, type] = {
    "init": settings.InitConfig,
    "tune": settings.TuneConfig,
    "plan": settings.PlanConfig,
    "generate": settings.GenerateConfig,
    "evaluate": settings.EvaluateConfig,
    "export": settings.ExportConfig,
    "inspect": settings.InspectConfig,
}


def main(args: list[str] | None = None) -> None:
    """Run a subcommand. A user's mistake is one line and exit status 2."""
    args = sys.argv[1:] if args is None else list(args)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.formatwarning = lambda message, *_, **__: f"ee-tuning: warning: {message}\n"
    try:
        _run(args)
    except UserError as error:
        _fail(str(error), debug, 2)
    except ProcessFailed as error:
        _fail(str(error), debug, 1)
    except Interrupted as error:
        _fail(str(error), debug, 130)
    except KeyboardInterrupt:
        _fail("stopped", debug, 130)


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
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return
    if args[0] == "--version":
        from ee_tuning import __version__

        print(__version__)
        return
    if args[0] not in COMMANDS:
        raise UserError(
            f"unknown command {args[0]!r}{_nearest(args[0], COMMANDS)}; see ee-tuning --help"
        )
    name = args[0]
    config = parse(name, COMMANDS[name], args[1:])
    getattr(importlib.import_module(f"ee_tuning.commands.{name}"), name)(config)


def _overview() -> str:
    lines = ["usage: ee-tuning COMMAND [--config FILE.yaml] [--FLAG VALUE ...]", ""]
    lines += [f"  {name:10}{config_class.__doc__}" for name, config_class in COMMANDS.items()]
    lines += ["", "ee-tuning COMMAND --help lists the flags; --debug shows tracebacks."]
    return "\n".join(lines)


def parse(command: str, config_class: type, args: list[str]) -> Any:
    """An instance of `config_class` from flags and YAML: a flag beats the file, that the default.

    The one positional argument of ``inspect`` is its path.

    Raises:
        UserError: an unknown flag or key (naming a near one) or a value of the wrong type.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=f"ee-tuning {command}", description=config_class.__doc__, exit_on_error=False
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with any of these keys"
    )
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    for field in fields:
        name = f"--{field.name.replace('_', '-')}"
        if config_class is settings.InspectConfig:
            parser.add_argument(field.name, type=str, help=field.metadata["help"])
            continue
        kind: dict[str, Any] = {"type": hints[field.name]}
        if typing.get_origin(hints[field.name]) is list:
            kind = {"type": typing.get_args(hints[field.name])[0], "nargs": "*"}
        if hints[field.name] is bool:
            kind = {"type": bool, "nargs": "?", "const": True}
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        parser.add_argument(name, default=default, help=field.metadata["help"], **kind)
    if command == "tune" and "--resume" in args and "--config" not in args:
        args = _resumed(args)
    try:
        parsed = parser.parse_args(args)
    except ArgumentError as error:
        message = _explain(str(error), [field.name for field in fields])
        if "parsing config" in message:
            message = f"{args[args.index('--config') + 1]} is not valid YAML: {message}"
        raise UserError(message) from error
    return config_class(**{field.name: parsed[field.name] for field in fields})


def _resumed(args: list[str]) -> list[str]:
    """``tune --out X --resume`` goes on with the settings that ``X/run.yaml`` keeps."""
    out = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == "--out"]
    saved = Path(out[-1]) / "run.yaml" if out else Path()
    return ["--config", str(saved), *args] if saved.is_file() else args


def _explain(message: str, known: list[str]) -> str:
    """jsonargparse's message as one line, with the nearest known name for an unknown one."""
    message = " ".join(message.split()).removeprefix("error: ")
    for mark in ("unrecognized arguments: ", "Option '"):
        if mark in message:
            unknown = message.split(mark)[1].split()[0].strip("'\"").split("=")[0]
            name = unknown.removeprefix("--").replace("-", "_")
            return f"unknown setting {unknown!r}{_nearest(name, known)}"
    wrong = re.match(r"""Parser key "(\w+)".*?: Expected an? (.*)\. Got value: (.*)""", message)
    if wrong:
        name, kind, value = wrong.groups()
        kind = re.sub(r"<class '(\w+)'>|typing\.", r"\1", kind)
        return f"{name} is {value!r}: it must be of type {kind}"
    return message


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
