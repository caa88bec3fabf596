"""No setting of any command, field of a request or argument of `generate` is nan or infinite."""

import dataclasses
import json
import math
import typing

import pytest
import torch
import yaml
from helpers.models import early_exit
from pydantic import ValidationError
from transformers import GenerationConfig

from ee_tuning.cli import COMMANDS
from ee_tuning.errors import UserError
from ee_tuning.parsing import parse
from ee_tuning.serve.bodies import ChatBody, CompletionBody

NOT_FINITE = [math.nan, math.inf, -math.inf]
BODIES = [
    (CompletionBody, {"prompt": "a"}),
    (ChatBody, {"messages": [{"role": "user", "content": "a"}]}),
]


def shapes(hint):
    """How a number may be given for a type: alone, in a list, in a mapping."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is float:
        return {"alone"}
    if kind is list:
        return {"list"} if float in parts else set()
    if kind is dict:
        return {"mapping"} if shapes(parts[1]) else set()
    return set().union(*map(shapes, parts))


def given(shape, value, key):
    return {"alone": value, "list": [0.5, value], "mapping": {key: value}}[shape]


SETTINGS = [
    (command, name, shape)
    for command, config in COMMANDS.items()
    for name, hint in typing.get_type_hints(config).items()
    for shape in sorted(shapes(hint))
    if name in {field.name for field in dataclasses.fields(config)}
]
FIELDS = [
    (body, needed, name, shape)
    for body, needed in BODIES
    for name, hint in typing.get_type_hints(body, include_extras=True).items()
    for shape in sorted(shapes(hint))
]


def test_there_are_such_settings_and_fields():
    assert {
        ("tune", "lr", "alone"), ("tune", "min_lr", "alone"), ("plan", "loss_weights", "list"),
        ("regenerate", "temperature", "alone"), ("regenerate", "from_nothing", "alone"),
        ("generate", "threshold", "mapping"), ("serve", "grace", "alone"),
        ("evaluate", "thresholds", "list"), ("calibrate", "epsilon", "alone"),
        ("suggest", "minutes", "alone"),
    } <= {*SETTINGS}  # fmt: skip
    found = {(body, name, shape) for body, _, name, shape in FIELDS}
    assert (ChatBody, "logit_bias", "mapping") in found
    assert {(body, "threshold", shape) for body, _ in BODIES for shape in ("alone", "mapping")} <= (
        found
    )


@pytest.mark.parametrize(("command", "name", "shape"), SETTINGS)
def test_settings(command, name, shape, tmp_path):
    for number in NOT_FINITE:
        value = given(shape, number, 8)
        with pytest.raises(UserError, match=f"^{name} is {number}: it must be a finite number$"):
            COMMANDS[command](**{name: value})
        file = tmp_path / "run.yaml"
        file.write_text(yaml.dump({name: value}))
        with pytest.raises(UserError, match=f"{name} is {number}: it must be a finite number$"):
            parse(command, COMMANDS[command], ["--config", str(file)])


@pytest.mark.parametrize(("body", "needed", "name", "shape"), FIELDS)
def test_fields_of_requests(body, needed, name, shape):
    for number in NOT_FINITE:
        text = json.dumps({**needed, name: given(shape, number, "8")})
        with pytest.raises(ValidationError, match=f"{name}.*\n.*finite number"):
            body.model_validate(json.loads(text))


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_arguments_of_generate(name):
    ids = torch.tensor([[1, 2]])
    for number in NOT_FINITE:
        for kwargs in ({name: number}, {"generation_config": GenerationConfig(**{name: number})}):
            with pytest.raises(UserError, match=f"{name} is {number}: it must be a finite number"):
                early_exit().generate(ids, do_sample=True, max_new_tokens=2, **kwargs)
