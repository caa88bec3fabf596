"""Settings from flags and YAML files: a flag beats a file, that the default."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import shlex
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, get_loader

from ee_tuning.config import InspectConfig
from ee_tuning.errors import UserError, first_line
from ee_tuning.files import check_folder
from ee_tuning.folders import UNFINISHED

FOLDERS = {
    "model": "backbone", "exits": "exits", "tokenizer": "tokenizer", "path": "backbone or exits",
}  # fmt: skip

WRONG = (  # jsonargparse's words for a value of the wrong type: the setting, then the value
    r"""Parser key "(\w+)".*Given value:(.*)""",
    r"""Parser key "(\w+)".*Got value:(.*)""",
    r"""Parser key "(\w+)": (?:invalid literal|could not convert) .*?: (.*)""",
    r"""argument --([\w-]+): invalid \w+ value: (.*)""",
)

TEXTS = ("--prompt", "--system")  # of several words, without quotation marks around them


def parse(command: str, config_class: type, args: list[str]) -> Any:
    """An instance of `config_class` from `args`, flags as ``--name value`` or ``--name=value``.

    A flag that takes several values may be given several times: they add up, in place of the
    file's. Of several files the later ones beat those before. The one positional argument of
    ``inspect`` is its path. ``tune --out X --resume`` goes on with what ``X/run.yaml`` keeps.

    Raises:
        UserError: an unknown flag or key (naming a near one), a value of the wrong type, or a
            file that cannot be read.
    """
    files, flags = _config_files(args)
    config = _parse(command, config_class, files, flags)
    if command == "tune" and config.resume and not files:
        # A run that was to replace another one, but was cut off before it could, comes first.
        for saved in (Path(config.out) / UNFINISHED / "run.yaml", Path(config.out) / "run.yaml"):
            if config.out and saved.is_file():
                return _parse(command, config_class, [str(saved)], flags)
    return config


def check_folders(config: Any) -> None:
    """Refuse folders that are not there, before anything is imported to read them; and exits or a
    backbone that a list before them took for data.

    Raises:
        UserError: names the first one.
    """
    for name, what in FOLDERS.items():
        path = getattr(config, name, "")
        if path:
            check_folder(path, what)
    for field in dataclasses.fields(config):
        values = getattr(config, field.name)
        for value in values if field.metadata["path"] and isinstance(values, list) else ():
            meant = _kind(value)
            if meant in ("exits", "model") and not getattr(config, meant, value):
                taken = f"{value} is given with --{field.name.replace('_', '-')}"
                what = "exits" if meant == "exits" else "a backbone"
                raise UserError(f"{taken}, and is {what}: write --{meant} {shlex.quote(value)}")


def _kind(word: str) -> str:
    """The setting that a word may be of, by what there is of this name."""
    path = Path(word).expanduser()
    try:
        if (path / "exit_config.json").is_file() or (path / "checkpoints").is_dir():
            return "exits"
        if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
            return "model"
        return "data" if path.exists() else "prompt"
    except OSError:  # too long for a name
        return "prompt"


def _parse(command: str, config_class: type, files: list[str], flags: list[str]) -> Any:
    parser = _parser(command, config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    values = Namespace()
    try:
        for file in files:
            values = _read(file, parser, config_class, values)
        parsed = parser.parse_args(_joined(flags, config_class), namespace=values)
    except ArgumentError as error:
        hints = typing.get_type_hints(config_class)
        raise UserError(_explain(str(error), hints, flags)) from error
    return config_class(**{name: parsed[name] for name in names})


def _parser(command: str, config_class: type) -> ArgumentParser:
    description = config_class.__doc__
    parser = ArgumentParser(
        prog=f"ee-tuning {command}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with any of these keys"
    )
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name = f"--{field.name.replace('_', '-')}"
        if config_class is InspectConfig and field.name == "path":
            parser.add_argument(field.name, type=str, help=field.metadata["help"])
            continue
        kind: dict[str, Any] = {"type": hints[field.name]}
        if _is_list(hints[field.name]):
            (item,) = typing.get_args(hints[field.name])
            kind = {"type": item, "nargs": "*", "action": _adding_up()}
        if hints[field.name] is bool:
            kind = {"type": bool, "nargs": "?", "const": True}
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        parser.add_argument(name, default=default, help=field.metadata["help"], **kind)
    return parser


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is list


def _adding_up() -> type[argparse.Action]:
    """An action for a flag of several values that may be given several times.

    What was there before the first time, from a file or by default, it replaces.
    """

    class AddingUp(argparse.Action):
        given = False

        def __call__(
            self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
        ) -> None:
            before = getattr(namespace, self.dest) if self.given else []
            self.given = True
            setattr(namespace, self.dest, [*before, *values])

    return AddingUp


def _joined(flags: list[str], config_class: type) -> list[str]:
    """`flags`, but one in place of several of a setting that takes a list with commas.

    So ``--layers 4 --layers=8`` is ``--layers=4,8``.
    """
    hints, found, firsts = typing.get_type_hints(config_class), list[str](), dict[str, int]()
    waiting = list(flags)
    while waiting:
        flag = waiting.pop(0)
        name, sign, value = flag.partition("=")
        if not name.startswith("--") or not _takes_commas(hints.get(_key(name))):
            found.append(flag)
            continue
        if not sign and waiting and not waiting[0].startswith("--"):
            sign, value = "=", waiting.pop(0)
        if value and name in firsts:
            found[firsts[name]] += f",{value}"
        else:
            firsts[name] = len(found)
            found.append(f"{name}{sign}{value}")
    return found


def _takes_commas(kind: Any) -> bool:
    """Whether a setting is a text that may be a list, too."""
    return any(map(_is_list, typing.get_args(kind)))


def _config_files(args: list[str]) -> tuple[list[str], list[str]]:
    """The files that ``--config`` names, and the other arguments."""
    files, others = [], []
    waiting = iter(args)
    for arg in waiting:
        if arg == "--config":
            file = next(waiting, "")
            if not file:
                raise UserError("--config needs the name of a YAML file")
            files.append(file)
        elif arg.startswith("--config="):
            files.append(arg.removeprefix("--config="))
        else:
            others.append(arg)
    return [os.path.expanduser(file) for file in files], others


def _read(file: str, parser: ArgumentParser, config_class: type, before: Namespace) -> Namespace:
    """The settings in a YAML file, over those `before`.

    A single value where a list is meant is a list of one; a key without a value is as if it were
    not there.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        found = get_loader("yaml")(text)
        _refuse_twice(file, yaml.compose(text))
    except OSError as error:
        raise UserError(f"cannot read the settings in {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not in UTF-8: convert it") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {_where(error)}") from error
    if not isinstance(found, dict | None):
        raise UserError(f"{file} holds no settings: write them as lines of `name: value`")
    hints = typing.get_type_hints(config_class)
    values = {str(name): value for name, value in (found or {}).items() if value is not None}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{file}: {_unknown(name, hints)}")
        if _is_list(hints.get(name)):
            items = values[name] = value if isinstance(value, list) else [value]
            if any(isinstance(item, dict | list) for item in items):
                raise UserError(f"{file}: {name} is {value!r}: it must be a list of single values")
    try:
        return parser.parse_object(values, before)
    except ArgumentError as error:
        raise UserError(f"{file}: {_explain(str(error), hints, [])}") from error


def _where(error: yaml.YAMLError) -> str:
    """What a YAML file has wrong, in which line, and what began in which line before it."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return first_line(error)
    places = (error.problem, error.problem_mark), (error.context, error.context_mark)
    found = [f"{what} in line {mark.line + 1}" for what, mark in places if what and mark]
    return ", ".join(found)


def _refuse_twice(file: str, root: yaml.Node | None) -> None:
    """Refuse a key that a YAML file has twice, of which the last one would be taken.

    root: the file's; settings may be mappings, too.

    Raises:
        UserError: names both lines.
    """
    settings = [value for _, value in root.value] if isinstance(root, yaml.MappingNode) else []
    for mapping in (root, *settings):
        lines: dict[str, int] = {}
        for key, _ in mapping.value if isinstance(mapping, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"{file} line {line}: {key.value} is given twice, first in line "
                    f"{lines[key.value]}: leave one out"
                )
            lines[key.value] = line


def _explain(message: str, hints: dict[str, Any], flags: list[str]) -> str:
    """jsonargparse's message as one line, with the nearest known name for an unknown one.

    hints: types of the settings by name. flags: as they were given.
    """
    message = " ".join(message.split()).removeprefix("error: ")
    _, mark, rest = message.partition("unrecognized arguments: ")
    if mark:
        unknown = rest.split()[0].strip("'\"").split("=")[0]
        return _unknown(unknown, hints) if unknown[:1] == "-" else _left_over(rest, hints, flags)
    missing = re.match(r"argument --([\w-]+)\S*: expected (?:one|at least one) argument", message)
    if missing:
        kind = hints.get(_key(missing[1]))
        which = f", {_wanted(kind)}" if _choices(kind) else ""
        return (
            f"--{missing[1]} needs a value{which}; one that begins with - is written "
            f"--{missing[1]}=VALUE"
        )
    if message.startswith("the following arguments are required: "):  # of inspect, its path
        return "no path given: name the folder or hub id of one backbone or exits"
    wrong = next(filter(None, (re.match(form, message) for form in WRONG)), None)
    if not wrong or _key(wrong[1]) not in hints:
        return message
    name, value = _key(wrong[1]), wrong[2].strip().strip("'")
    kind = hints[name]
    if kind is bool and value and value in flags:
        flag, advice = f"--{name.replace('_', '-')}", _advice([value], hints, flags)
        return f"{flag} takes true, false or nothing, not {value!r}: {advice}"
    kinds = {kind, *typing.get_args(kind)}
    shown = value if str in kinds or value[:1] in ("[", "{") else repr(value)
    if _is_list(kind) and flags:
        (item,) = typing.get_args(kind)
        return f"{name}: {shown} must be {_wanted(item)}; several stand with spaces between them"
    quotes = " in quotation marks" if kinds <= {kind, str, type(None)} and str in kinds else ""
    return f"{name} is {shown}: it must be {_wanted(kind)}{quotes}"


def _wanted(kind: Any, many: bool = False) -> str:
    """A type as people call it: ``a whole number or 'auto'``; many: ``whole numbers``."""
    parts = typing.get_args(kind)
    if kind is bool:
        return "true or false"
    if kind in (int, float, str):
        word = {int: "whole number", float: "number", str: "text"}[kind]
        return f"{word}s" if many else f"a {word}"
    if choices := _choices(kind):
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if typing.get_origin(kind) is dict:
        return f"a mapping of {_wanted(parts[0], many=True)} to {_wanted(parts[1], many=True)}"
    if _is_list(kind):
        return f"a list of {_wanted(parts[0], many=True)}"
    *others, last = [_wanted(part, many) for part in parts if part is not type(None)]
    return f"{', '.join(others)} or {last}" if others else last


def _choices(kind: Any) -> list[str]:
    """The values, as they are written, of a type of which there are only some; else none."""
    literal = typing.get_origin(kind) is typing.Literal
    return [repr(value) for value in typing.get_args(kind) if value] if literal else []


def _unknown(name: str, hints: dict[str, Any]) -> str:
    """What to say of a key or, with dashes before it, a flag: a near one is named as such."""
    known = [f"--{key.replace('_', '-')}" for key in hints] if name[:2] == "--" else hints
    hint = nearest(name, known) or "; --help lists those that there are"
    return f"unknown setting {name!r}{hint}"


def _left_over(words: str, hints: dict[str, Any], flags: list[str]) -> str:
    """What to say of `words` that belong to no flag: often a flag's second value."""
    place = next((i for i, flag in enumerate(flags) if f"{words} ".startswith(f"{flag} ")), 0)
    start = next((i for i in range(place, -1, -1) if flags[i].startswith("--")), None)
    stop = next((i for i in range(place, len(flags)) if flags[i].startswith("--")), len(flags))
    advice = _advice(flags[place:stop], hints, flags)
    if start is None:
        return f"{flags[place]!r} belongs to no setting: {advice}"
    name, *first = flags[start].split("=", 1)
    values = first + flags[start + 1 : stop]
    commas = _takes_commas(hints.get(_key(name)))
    if commas or name in TEXTS:
        value = ",".join(one.strip(",") for one in values) if commas else " ".join(values)
        return f"{name} takes one value: write {shlex.quote(value)}"
    return f"{name} takes one value, and {flags[place]!r} is another one: {advice}"


def _advice(words: list[str], hints: dict[str, Any], flags: list[str]) -> str:
    """How to give words that stand by themselves: as what they may be, if that was not given."""
    if "path" in hints:
        return "give the path of one backbone or exits first, then settings as --name value"
    name = _kind(words[0])
    if name not in hints or any(flag.split("=")[0] == f"--{name}" for flag in flags):
        return "give settings as --name value"
    return f"write --{name} {shlex.quote(' '.join(words) if name == 'prompt' else words[0])}"


def _key(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean …?`` of the known name nearest to `name`, or nothing."""
    bare = {one.lstrip("-"): one for one in known}  # dashes are alike in all
    near = difflib.get_close_matches(name.lstrip("-"), list(bare), n=1)
    return f"; did you mean {bare[near[0]]}?" if near else ""
