"""Checkpoints: everything a run needs to go on bit for bit, in safetensors and JSON.

A checkpoint is a folder ``checkpoints/step-000500/`` with the exits (fp32 master weights), the
optimizer's state and the random state, and ``state.json``. The learning rate and the data's
position are functions of the step alone, so the step is all there is to store of them.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ee_tuning.config import TuneConfig
from ee_tuning.errors import UserError
from ee_tuning.files import read_json, replacing, write_json
from ee_tuning.model import WEIGHTS_NAME, EarlyExitModel
from ee_tuning.tune.optimizer import Optimizers, set_learning_rate

# What may not change between a run and its continuation: the exits and the order of the data.
FIXED = (
    "model", "layers", "arch", "head", "exits", "data", "seq_length", "global_batch_size", "seed",
    "valid_data", "valid_fraction", "steps", "exit_vocab", "optimizer", "master_weights",
)  # fmt: skip


def save_checkpoint(
    folder: Path,
    step: int,
    model: EarlyExitModel,
    optimizers: Optimizers,
    config: TuneConfig,
) -> Path:
    """Write the checkpoint of `step` under `folder` and remove all but the last `config.keep`."""
    path = folder / f"step-{step:06d}"
    with replacing(path) as temporary:
        temporary.mkdir()
        save_file(model.exit_state(), temporary / WEIGHTS_NAME)
        save_file(_optimizer_tensors(model, optimizers), temporary / "optimizer.safetensors")
        settings = {key: getattr(config, key) for key in FIXED}
        write_json(temporary / "state.json", {"step": step, "settings": settings})
    for old in checkpoints(folder)[: -config.keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


def load_checkpoint(
    folder: Path, model: EarlyExitModel, optimizers: Optimizers, config: TuneConfig
) -> int:
    """Put the last checkpoint under `folder` into `model` and `optimizers`; gives its step.

    Raises:
        UserError: there is none, it is damaged, or a setting differs that may not.
    """
    found = checkpoints(folder)
    if not found:
        raise UserError(f"nothing to resume: {folder} holds no checkpoint")
    state = read_json(found[-1] / "state.json")
    now = dataclasses.asdict(config)
    for key, value in state["settings"].items():
        if now[key] != value:
            raise UserError(
                f"cannot resume {found[-1]}: {key} was {value!r} and is now {now[key]!r}; "
                "start anew with --overwrite or give the same"
            )
    model.load_exits(found[-1] / WEIGHTS_NAME)
    try:
        tensors = load_file(found[-1] / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{found[-1]} is damaged ({error}): remove it and resume from the one before"
        ) from error
    _restore_optimizers(model, optimizers, tensors)
    return state["step"]


def _optimizer_tensors(model: EarlyExitModel, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """The optimizers' state by parameter name, and torch's random state."""
    tensors = {
        ":".join((f"{layer}.{name}", key, *inner)): value.contiguous()
        for layer, optimizer in optimizers.items()
        for name, p in model.exit(layer).named_parameters()
        for key, state in optimizer.state[p].items()
        for inner, value in _plain_tensors(state)
    }
    tensors["random:cpu"] = torch.get_rng_state()
    if model.backbone.device.type == "cuda":
        tensors["random:cuda"] = torch.cuda.get_rng_state()
    return tensors


def _plain_tensors(state: torch.Tensor) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """A tensor of a state, or the plain tensors that a quantised one is made of, by name."""
    if not is_traceable_wrapper_subclass(state):
        return [((), state)]
    return [((name,), getattr(state, name)) for name in state.__tensor_flatten__()[0]]


def _restore_optimizers(
    model: EarlyExitModel, optimizers: Optimizers, tensors: dict[str, torch.Tensor]
) -> None:
    parameters = dict(model.exits.named_parameters())
    if any(key.count(":") == 2 for key in tensors):
        _make_state(optimizers)
    random = {key: tensors.pop(key) for key in list(tensors) if key.startswith("random:")}
    for path, value in tensors.items():
        name, key, *inner = path.split(":")
        p, optimizer = parameters[name], optimizers[int(name.partition(".")[0])]
        state: dict[str, Any] = optimizer.state[p]
        if inner:
            getattr(state[key], inner[0]).copy_(value)
        else:
            on_host = key == "step" and not optimizer.defaults.get("fused")
            state[key] = value if on_host else value.to(p.device)
    torch.set_rng_state(random["random:cpu"])
    if "random:cuda" in random:
        torch.cuda.set_rng_state(random["random:cuda"])


def _make_state(optimizers: Optimizers) -> None:
    """Let optimizers make their quantised state, by a step that changes no weight."""
    for optimizer in optimizers.values():
        set_learning_rate(optimizer, 0.0)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
