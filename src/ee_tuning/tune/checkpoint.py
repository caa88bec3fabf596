"""Checkpoints: everything a run needs to go on bit for bit, in safetensors and JSON.

A checkpoint is a folder ``checkpoints/step-000500/`` with, for each exit, its master weights
(``exit-8.safetensors``) and its optimizer's state (``optimizer-8.safetensors``), the random state
and ``state.json``; ``exit_config.json`` makes it saved exits as well. The learning rate and the
data's position are functions of the step alone, so the step is all there is to store of them. The
tensors are whole however many processes a run has, so a run may go on with another number of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ee_tuning.adapter import CONFIG_NAME, checkpoints, saved_config
from ee_tuning.config import TuneConfig
from ee_tuning.errors import UserError
from ee_tuning.files import put_at, read_object, write_json, writing
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.slices import COLUMNS, SplitParameter, part, whole
from ee_tuning.tune.optimizers import Optimizers, set_learning_rate

Contents = dict[str, dict[str, str]]  # what a run works on, by kind and name: hashes of it


def save_checkpoint(
    folder: Path,
    step: int,
    model: Network,
    optimizers: Optimizers,
    config: TuneConfig,
    contents: Contents,
    mesh: Mesh,
    on_written: Callable[[int], None] = lambda step: None,
) -> Path:
    """Write the checkpoint of `step` under `folder` and remove all but the last `config.keep`.

    Each exit is written by a process that has it, whole: the files do not depend on the mesh.
    on_written: called with `step` when this process has written its exits.
    """
    path = folder / f"step-{step:06d}"
    partial = folder / f".{path.name}"
    try:
        with writing(path):
            partial.mkdir(parents=True, exist_ok=True)
            _write_exits(partial, model, optimizers, mesh)
            on_written(step)
            mesh.barrier()
            if mesh.is_main:
                save_file(_common_tensors(model), partial / "common.safetensors")
                state = {"step": step, "steps": config.steps, "settings": config.fixed()}
                write_json(partial / "state.json", state | {"contents": contents})
                write_json(partial / CONFIG_NAME, saved_config(model))
                put_at(partial, path)
                for old in checkpoints(folder)[: -config.keep]:
                    shutil.rmtree(old)
            mesh.barrier()
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _write_exits(folder: Path, model: Network, optimizers: Optimizers, mesh: Mesh) -> None:
    """Write this stage's exits, which takes all its processes to make them whole."""
    for layer in model.exit_layers:
        weights, state = exit_tensors(model, optimizers, layer)
        if mesh.dp_rank == mesh.tp_rank == 0:
            save_file(weights, folder / f"exit-{layer}.safetensors")
            save_file(state, folder / f"optimizer-{layer}.safetensors")


def load_checkpoint(
    path: Path, model: Network, optimizers: Optimizers, config: TuneConfig, contents: Contents
) -> tuple[int, int]:
    """Put a checkpoint into `model` and `optimizers`; gives its step and those its run was to make.

    Raises:
        UserError: it is damaged, a setting or what the run works on differs that may not, or it has
            more steps than asked.
    """
    try:
        state = read_object(path / "state.json", step=int, settings=dict)
    except UserError as error:
        raise UserError(f"{error}; remove {path} and resume from the one before") from None
    before = state["settings"]
    steps = state.get("steps") or before["steps"]  # which stood there in earlier versions
    for key, value in config.fixed().items():
        if before.get(key, value) != value:
            raise UserError(
                f"cannot resume {path}: {key} was {before[key]!r} and is now {value!r}; "
                "start anew with --overwrite or give the same"
            )
    _check_contents(path, state.get("contents", {}), contents)
    if config.steps < state["step"]:
        raise UserError(
            f"steps is {config.steps}, but {path.parents[1]} has made {state['step']} already: "
            "give as many or more"
        )
    common = _read(path / "common.safetensors")
    if "vocabulary" in common:
        model.reduce_vocabulary(common["vocabulary"])
    for layer in model.exit_layers:
        _restore_exit(model, layer, _read(path / f"exit-{layer}.safetensors"))
        optimizer = _read(path / f"optimizer-{layer}.safetensors")
        _restore_optimizer(model, optimizers, layer, optimizer)
    torch.set_rng_state(common["random:cpu"])
    if "random:cuda" in common and model.backbone.device.type == "cuda":
        torch.cuda.set_rng_state(common["random:cuda"])
    return state["step"], steps


def _check_contents(path: Path, before: Contents, now: Contents) -> None:
    """Refuse to go on with another backbone, other exits or other data, whatever their names.

    A process of a pipeline, or of a run that needs less of the backbone, has hashes of parts.

    Raises:
        UserError: names the first that differs.
    """
    for kind, hashes in before.items():
        for name, value in hashes.items():
            if now[kind].get(name, value) != value:
                raise UserError(
                    f"cannot resume {path}: {kind} {name} is not what it was when the run began; "
                    "give what it was, or start anew with --overwrite"
                )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path.parent} is damaged ({path.name}: {error}): remove it and resume from the one "
            "before"
        ) from error


def exit_tensors(
    model: Network, optimizers: Optimizers, layer: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An exit's weights and its optimizer's state by name, whole, on the host."""
    weights, states = {}, {}
    for name, p in model.exit(layer).named_parameters():
        weights[name] = whole(p, p.detach())
        for key, state in optimizers[layer].state[p].items():
            for inner, value in _plain_tensors(state):
                states[":".join((name, key, *inner))] = _whole(p, value, inner).contiguous()
    return weights, states


def _whole(p: Tensor, value: Tensor, inner: tuple[str, ...]) -> Tensor:
    """A tensor of the state of `p`, whole: split as `p` is are also the scales of its blocks."""
    if inner == ("scale",):
        return whole(p, _by_row(p, value, p.shape[0])).flatten()
    return whole(p, value) if value.shape == p.shape else value


def _part(p: Tensor, value: Tensor, inner: str) -> Tensor:
    """This process's part of a tensor of a quantised state: see `_whole`."""
    if inner == "scale":
        rows = p.whole_shape[0] if isinstance(p, SplitParameter) else p.shape[0]
        return part(p, _by_row(p, value, rows)).flatten()
    return part(p, value) if inner == "codes" else value


def _by_row(p: Tensor, scales: Tensor, rows: int) -> Tensor:
    """Scales (blocks,) of `p` or of its whole, which has so many rows, as they are cut."""
    in_columns = isinstance(p, SplitParameter) and any(cut.dim == COLUMNS for cut in p.cuts)
    return scales.view(rows, -1) if in_columns else scales


def _common_tensors(model: Network) -> dict[str, Tensor]:
    """The reduced vocabulary, if there is one, and torch's random state."""
    tensors = {"random:cpu": torch.get_rng_state()}
    if model.vocabulary is not None:
        tensors["vocabulary"] = model.vocabulary.tokens
    if model.backbone.device.type == "cuda":
        tensors["random:cuda"] = torch.cuda.get_rng_state()
    return tensors


def _plain_tensors(state: Tensor) -> list[tuple[tuple[str, ...], Tensor]]:
    """A tensor of a state, or the plain tensors that a quantised one is made of, by name."""
    if not is_traceable_wrapper_subclass(state):
        return [((), state)]
    return [((name,), getattr(state, name)) for name in state.__tensor_flatten__()[0]]


@torch.no_grad()
def _restore_exit(model: Network, layer: int, weights: dict[str, Tensor]) -> None:
    for name, p in model.exit(layer).named_parameters():
        p.copy_(part(p, weights[name]))


def _restore_optimizer(
    model: Network, optimizers: Optimizers, layer: int, tensors: dict[str, Tensor]
) -> None:
    """Put an optimizer's saved state, or this process's part of it, into place.

    What is quantised here need not have been there, where it may have been cut otherwise.
    """
    parameters, optimizer = dict(model.exit(layer).named_parameters()), optimizers[layer]
    if not isinstance(optimizer, torch.optim.AdamW):
        _make_state(optimizer)
    saved: dict[tuple[str, str], dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, key, *rest = path.split(":")
        saved.setdefault((name, key), {})["".join(rest)] = value
    for (name, key), values in saved.items():
        p, state = parameters[name], optimizer.state[parameters[name]]
        own = state.get(key)
        if key == "step":  # on the host, but for fused kernels
            state[key] = values[""].to(p.device if optimizer.defaults.get("fused") else "cpu")
        elif own is not None and is_traceable_wrapper_subclass(own) and "" not in values:
            for inner, value in values.items():
                getattr(own, inner).copy_(_part(p, value, inner))
        elif own is None:
            state[key] = part(p, values[""]).to(p.device)
        else:
            own.copy_(part(p, _plain(values)).to(p.device))


def _plain(values: dict[str, Tensor]) -> Tensor:
    """A tensor of a state that was saved as it is, or as what a quantised one is made of."""
    if "" in values:
        return values[""]
    blocks = values["qmap"][values["codes"].int()].view(len(values["scale"]), -1)
    return (blocks * values["scale"].unsqueeze(1)).view(values["codes"].shape)


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer make its quantised state, by a step that changes no weight."""
    set_learning_rate(optimizer, 0.0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
