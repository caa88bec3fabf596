"""What a run works on, made from its settings: this process's part of the model, and the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from rich.console import Console

from ee_tuning.backbone import Backbone
from ee_tuning.config import TuneConfig
from ee_tuning.costs import work
from ee_tuning.data import collate, load_packed, micro_batches, split_validation
from ee_tuning.errors import UserError
from ee_tuning.loading import Slices, load_tokenizer
from ee_tuning.losses import IGNORED
from ee_tuning.model import EarlyExitModel
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.plan import shapes_of
from ee_tuning.stages import cut_stages
from ee_tuning.tune.measure import measured_costs
from ee_tuning.tune.step import Batch
from ee_tuning.vocabulary import most_frequent

COMPARED_ROWS = 1024  # between processes, at least, where a data set has so many
COUNTED_TOKENS = 2**26  # of the data at most, to find the most frequent tokens


def build_model(
    config: TuneConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype, console: Console
) -> EarlyExitModel:
    """Exits to tune, of this process's stage, on what they need of the backbone in `dtype`.

    Raises:
        UserError: see `own_stage`, `EarlyExitModel.from_base`; or processes have different
            backbones.
    """
    load: dict[str, Any] = {
        "stage": own_stage(config, mesh, device, dtype, console),
        "whole": config.loss != "ce",
        "dtype": dtype,
        "device": device,
        "backbone_precision": config.backbone_precision,
    }
    if config.shard_backbone:
        load["shard"] = mesh.group("dp")
    if config.tp > 1:  # rows of a head are picked from all of it
        load["slices"] = Slices(mesh.axis("tp"), head=not config.exit_vocab)

    def read() -> EarlyExitModel:
        if not config.exits:
            return EarlyExitModel.from_base(config.model, config.exit_config(), **load)
        given = config.exits, config.model or None
        return EarlyExitModel.from_pretrained(*given, exit_dtype=torch.float32, **load)

    model = mesh.on_all(read)
    model.tensor_hashes = _all_hashes(model, mesh)
    return model


def _all_hashes(model: EarlyExitModel, mesh: Mesh) -> dict[str, str]:
    """The fingerprint of a backbone of which each process may have some parts.

    Raises:
        UserError: two processes read different values of a part.
    """
    found: dict[str, str] = {}
    for rank, hashes in enumerate(mesh.gather_on_host(model.tensor_hashes)):
        for part, value in hashes.items():
            if found.setdefault(part, value) != value:
                raise UserError(
                    f"rank {rank} has another backbone than those before it, the {part} differs: "
                    "give every process the same"
                )
    return found


def own_stage(
    config: TuneConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype, console: Console
) -> range | None:
    """The layers of this process's stage, counted from 0; None for all that the exits need.

    Raises:
        UserError: the backbone cannot be cut into so many stages.
    """
    if config.pp == 1:
        return None
    shapes = shapes_of(config)
    if config.balance == "measured":
        costs = mesh.on_main(lambda: measured_costs(shapes, config, device, dtype))
    else:
        costs = work(shapes, config.seq_length, config.exit_vocab).tuning()
    stages = cut_stages(costs, config.pp, config.stage_layers)
    text = ", ".join(f"{stage.start + 1}–{stage.stop}" for stage in stages)
    console.print(f"layers of the stages: {text}", highlight=False)
    return stages[mesh.pp_rank]


def load_data(
    config: TuneConfig, model: EarlyExitModel, mesh: Mesh
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Packed sequences to tune on, and to validate with.

    Raises:
        UserError: no data, or other data than another process has.
    """
    both = mesh.on_all(lambda: _pack(config, model.backbone))
    mesh.check_same("data", digest(*map(_sample, both)))
    return both


def _pack(config: TuneConfig, backbone: Backbone) -> tuple[datasets.Dataset, datasets.Dataset]:
    """See `load_data`."""
    path = config.tokenizer or backbone.model.name_or_path
    tokenizer = load_tokenizer(path, backbone.config.vocab_size)
    load = (tokenizer, config.seq_length, config.seed, config)
    packed = load_packed(config.data, *load)
    if config.valid_data:
        return packed, load_packed(config.valid_data, *load)
    return split_validation(packed, config.valid_fraction, config.seed)


def digest(*values: Any) -> str:
    """A short text that differs where `values` do."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _sample(data: datasets.Dataset) -> Any:
    """The size of a packed data set and a hash of rows of it, spread evenly."""
    rows = range(0, len(data), max(1, len(data) // COMPARED_ROWS))
    found = collate(data, rows)
    hashes = [hashlib.sha256(values.numpy().tobytes()).hexdigest() for values in found.values()]
    return len(data), hashes


def reduce_vocabulary(
    model: EarlyExitModel,
    train: datasets.Dataset,
    valid: datasets.Dataset,
    config: TuneConfig,
    console: Console,
) -> None:
    """Let the exits know only the most frequent tokens of the data, and say what is lost."""

    def batches(data: datasets.Dataset) -> Iterator[Batch]:
        rows = min(len(data), COUNTED_TOKENS // config.seq_length + 1)
        return micro_batches(data, range(rows), 64)

    size = model.backbone.config.vocab_size
    tokens = most_frequent(batches(train), config.exit_vocab, size)
    model.reduce_vocabulary(tokens)
    vocabulary = model.vocabulary
    assert vocabulary is not None
    labels = torch.cat([batch["labels"].flatten() for batch in batches(valid)])
    lost = (vocabulary.known(labels) == IGNORED).sum() - (labels == IGNORED).sum()
    share = lost / (labels != IGNORED).sum().clamp(min=1)
    console.print(
        f"exits know {len(tokens):,} of {size:,} tokens; {share:.2%} of the held-out targets "
        "are others, which no exit is tuned on or measured with",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
