"""Which share of a model a process has, and the one way in which it comes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ee_tuning.adapter import (
    base_of,
    find_exits,
    read_calibration,
    read_exit_config,
    read_weights,
    saved_exits,
)
from ee_tuning.backbone import in_memory, plan_of
from ee_tuning.config import TuneConfig
from ee_tuning.devices import check_fp8
from ee_tuning.errors import UserError
from ee_tuning.exit_config import DRAFT, ExitConfig
from ee_tuning.fingerprint import check_same, config_values
from ee_tuning.loading import Parts, Slices, empty_backbone, load_backbone, load_config
from ee_tuning.model import Network
from ee_tuning.parallel.frozen import FrozenShard, FrozenShards
from ee_tuning.parallel.tensor import split_layer
from ee_tuning.quantise import check_installed, nothing_to_quantise, quantise
from ee_tuning.quantise.fp8 import freeze_in_fp8
from ee_tuning.tune_config import FrozenPrecision
from ee_tuning.vocabulary import Vocabulary

Kind = TypeVar("Kind", bound=Network)


@dataclass(frozen=True)
class New:
    """New exits on a backbone: a local folder, a hub id or a loaded model.

    trust: code that comes with it may run.
    """

    model: str | PreTrainedModel
    config: ExitConfig
    trust: bool = False


@dataclass(frozen=True)
class Saved:
    """Saved exits, a folder or a hub id, on their backbone, which is looked up if not given.

    trust: code that comes with the backbone may run.
    """

    exits: str
    model: str | PreTrainedModel | None = None
    trust: bool = False


@dataclass(frozen=True)
class Share:
    """What of a model a process has, and how.

    whole: False leaves out of memory the layers deeper than the deepest exit.
    stage: the layers, counted from 0, of its stage in a pipeline; default: up to the deepest exit.
        What another stage has is left out of memory.
    slices: of matrices that other processes have the rest of; see `load_backbone`.
    shard: the processes that each keep a part of the frozen layers' matrices, which are whole only
        while their layer runs.
    precision: unless ``same``, the frozen layers' matrices are quantised once they are read; in
        ``fp8`` the head's too if an exit shares it.
    dtype: of the backbone; ``auto``: as it is stored. exit_dtype: of saved exits; default the
        backbone's.
    device: default where the model is, CPU if it was not loaded yet.
    """

    whole: bool = True
    stage: range | None = None
    slices: Slices | None = None
    shard: dist.ProcessGroup | None = None
    precision: FrozenPrecision = "same"
    dtype: torch.dtype | str = "auto"
    exit_dtype: torch.dtype | None = None
    device: str | torch.device | None = None


@torch.inference_mode(False)  # whatever the caller is in: exits are tuned later, perhaps
def load(source: New | Saved, share: Share, kind: type[Kind]) -> Kind:
    """A process's share of a model, of class `kind`.

    Raises:
        UserError: files missing or damaged, exits made for another backbone, no dtype of models,
            or what cannot be quantised.
    """
    dtype = getattr(torch, share.dtype, None) if isinstance(share.dtype, str) else share.dtype
    if share.dtype not in ("auto", None) and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point
    ):
        raise UserError(
            f"dtype {share.dtype} is none for a model: use auto, float32, bfloat16 or float16"
        )
    half = dtype == torch.float16 and not isinstance(source.model, PreTrainedModel)
    if half:
        share = replace(share, dtype="auto", exit_dtype=share.exit_dtype or dtype)
    network = _new(source, share, kind) if isinstance(source, New) else _saved(source, share, kind)
    network.tensor_hashes  # noqa: B018 - of the weights as they are stored, before all else
    if half:
        _round_to_fp16(network, share)
    to_device(network, share)
    return network


def _round_to_fp16(network: Network, share: Share) -> None:
    """Round what was read as it is stored: small numbers of bf16 are others in fp16, and a
    fingerprint is of those that are stored."""
    for p in network.model.parameters():
        p.data = p.data.half()
    network.model.config.dtype = torch.float16
    network.exits.to(share.exit_dtype)


def shapes(source: New | Saved) -> Network:
    """A model without its weights, on the meta device, to look at its shapes.

    Its heads are whole; of a saved reduced vocabulary it knows only how many tokens it has.

    Raises:
        UserError: no such backbone or exits, or exits that the backbone cannot have.
    """
    assert not isinstance(source.model, PreTrainedModel)
    known = None
    if isinstance(source, New):
        path, config = source.model, source.config
    else:
        folder = find_exits(source.exits)
        saved = read_exit_config(folder)
        path, config = base_of(folder, saved, source.model), saved_exits(saved)
        _check_config(source, saved, path)
        known = saved.get("vocab_size")
    network = Network(empty_backbone(path, source.trust), replace(config, init="copy"))
    if known:
        network.vocabulary = Vocabulary(torch.arange(known), network.config.vocab_size)
    return network


def source_of(config: TuneConfig) -> New | Saved:
    """The exits that a tuning run begins with."""
    if config.exits:
        return Saved(config.exits, config.model or None, config.trust_remote_code)
    return New(config.model, config.exit_config(), config.trust_remote_code)


def _new(source: New, share: Share, kind: type[Kind]) -> Kind:
    model = source.model
    if isinstance(model, str):
        model = _read_backbone(model, source.config, share, source.trust)
    else:
        _check_loaded(model, share)
    return kind(model, source.config, share.stage)


def _saved(source: Saved, share: Share, kind: type[Kind]) -> Kind:
    folder = find_exits(source.exits)
    saved = read_exit_config(folder)
    config, model = saved_exits(saved), source.model
    if model is None or isinstance(model, str):
        model = _look_up(source, folder, saved, config, share)
    else:
        _check_loaded(model, share)
    check_same(saved["backbone"]["config"], config_values(model.config), source.exits)
    network = kind(model, config, share.stage)
    hashes = saved["backbone"]["tensors"]
    if share.stage is not None:
        hashes = {part: value for part, value in hashes.items() if part in network.tensor_hashes}
    check_same(hashes, network.tensor_hashes, source.exits)
    network.exits.to(share.exit_dtype or network.dtype)
    read_weights(network, folder)
    if network.vocabulary:
        network.vocabulary.coverage = saved.get("vocab_coverage")
        network.vocabulary.names = saved.get("vocab_names")
    network.calibration = read_calibration(folder)
    return network


def _check_loaded(model: Any, share: Share) -> None:
    """Refuse what is no loaded causal LM, or one that is not as `share` wants it.

    Raises:
        UserError: says what to give.
    """
    if not isinstance(model, PreTrainedModel):
        merge = " (of PEFT's, merge_and_unload())" if hasattr(model, "merge_and_unload") else ""
        raise UserError(
            "a backbone is a folder, a hub id or a causal LM of transformers, not a "
            f"{type(model).__name__}{merge}"
        )
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        raise UserError(
            f"the backbone is spread over {', '.join(sorted(places))} by its device_map: load it "
            "on one device"
        )
    if share.dtype not in ("auto", model.dtype, str(model.dtype).removeprefix("torch.")):
        raise UserError(
            f"the backbone is loaded in {model.dtype}, and dtype {share.dtype} is for one that is "
            "yet to be read: load it so, or leave dtype out"
        )


def _look_up(
    source: Saved, folder: Path, saved: dict[str, Any], config: ExitConfig, share: Share
) -> PreTrainedModel:
    """The backbone of saved exits, from where the caller or the exits say that it is."""
    assert not isinstance(source.model, PreTrainedModel)
    path = base_of(folder, saved, source.model)
    if not path:
        raise UserError(f"{source.exits} does not name its backbone: give it with --model")
    if share.slices and saved.get("vocab_size"):
        share = replace(share, slices=replace(share.slices, head=False))  # its rows are picked
    _check_config(source, saved, path)
    with _named_by(source):
        return _read_backbone(path, config, share, source.trust)


def _check_config(source: Saved, saved: dict[str, Any], path: str) -> None:
    """Refuse a backbone that exits were not made for, before layers are looked for that it lacks.

    Raises:
        UserError: names the first value of its config that differs; or it cannot be read.
    """
    with _named_by(source):
        found = config_values(load_config(path, source.trust))
    check_same(saved["backbone"]["config"], found, source.exits)


@contextmanager
def _named_by(source: Saved) -> Iterator[None]:
    """Inside, what is wrong with a backbone says that the exits named it, if they did."""
    try:
        yield
    except UserError as error:
        if source.model is not None:
            raise
        raise UserError(
            f"{error}; {source.exits} was made with that backbone: say where it is with --model"
        ) from error


def _read_backbone(path: str, config: ExitConfig, share: Share, trust: bool) -> PreTrainedModel:
    all_of_it = share.whole and share.stage is None
    parts = None if all_of_it else _needed(path, config, share.stage, trust)
    # What is quantised is split after that: the scales are those of whole rows.
    slices = share.slices if share.precision == "same" else None
    return load_backbone(path, parts, share.dtype, slices, trust)


def _needed(path: str, config: ExitConfig, stage: range | None, trust: bool) -> Parts:
    """What these exits, or those of a stage (layers from 0), need: its layers, the last one if a
    `layer` exit is made from it, and the embedding and head where they are used.

    A draft exit reads the tokens, too.
    """
    num_layers = load_config(path, trust).num_hidden_layers
    specs = config.specs(num_layers)
    layers = range(specs[-1].end(num_layers)) if stage is None else stage
    own = [spec for spec in specs if spec.is_in(layers, num_layers)]
    last = {num_layers} if any(spec.arch == "layer" for spec in own) else set()
    head = bool(own) or layers.stop == num_layers
    embedding = layers.start == 0 or any(spec.layer == DRAFT for spec in own)
    return Parts(frozenset(k + 1 for k in layers) | last, embedding, head)


def to_device(network: Network, share: Share) -> None:
    """Move a model to the share's device, layer by layer; quantised and sharded on the way.

    Raises:
        UserError: there is nothing that can be quantised, or a package is missing for it.
    """
    precision, device = share.precision, torch.device(share.device or network.model.device)
    quantises = precision != "same"
    if precision == "fp8":
        check_fp8("--backbone-precision", device)
    check_installed(precision)
    quantised, shards = 0, FrozenShards()
    for number, layer in enumerate(network.backbone.layers):
        layer.to(device)
        if quantises and in_memory(layer):
            quantised += quantise(layer, precision, network.dtype)
            if share.slices:
                split_layer(layer, plan_of(network.backbone), share.slices.mesh)
        if share.shard and in_memory(layer):
            shards[number] = FrozenShard(layer, share.shard)
    network.to(device)
    if shards:
        network.chain.gather(shards)
    if quantises and not quantised:
        raise nothing_to_quantise(network.model, precision)
    if precision == "fp8" and shares_head(network):
        freeze_in_fp8(network.backbone.head, backward=True)


def shares_head(network: Network) -> bool:
    """Whether an exit of this process uses the backbone's head."""
    exits: list[nn.Module] = list(network.exits.values())
    return any(exit.output.shared for exit in exits)  # type: ignore[union-attr]
