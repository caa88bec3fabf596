"""What a run works on, made from its settings: a model made ready for tuning, and the data.

`set_up` and `prepare` say what is done to a model, in order; `ee_tuning.parallel` has the parts
that several processes need.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ee_tuning import varlen
from ee_tuning.config import TuneConfig
from ee_tuning.data import (
    Rows,
    collate,
    contents,
    describe,
    load_packed,
    micro_batches,
    split_validation,
)
from ee_tuning.devices import check_fp8
from ee_tuning.loading import Slices, load_tokenizer
from ee_tuning.losses import IGNORED, Objective
from ee_tuning.model import Network
from ee_tuning.parallel.data import collect_hashes, shard_exits
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.pipeline import Pipeline
from ee_tuning.parallel.tensor import split_model
from ee_tuning.quantise.fp8 import tune_in_fp8
from ee_tuning.quantise.packages import compiles
from ee_tuning.share import Share, load, source_of
from ee_tuning.tune.optimizers import build_optimizers, cuts_no_block
from ee_tuning.tune.step import Alone, Batch, Transport, Tuner
from ee_tuning.tune_config import ObjectiveConfig, Precision
from ee_tuning.vocabulary import check_names, count_tokens, enough, most_frequent, names_of

IDENTIFYING_ROWS = 16
COMPARED_ROWS = 1024  # between processes, at least, where a data set has so many
COUNTED_TOKENS = 2**23  # of the data at most, to find the most frequent tokens
ONE_PROCESS = Mesh()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class SetUp:
    """What a run works with. pipeline: what goes between its processes, or is traced."""

    tuner: Tuner
    train: Rows
    valid: Rows
    pipeline: Pipeline

    def contents(self) -> dict[str, dict[str, str]]:
        """Hashes of what it is, by kind and name, to be compared by a run that goes on."""
        model = self.tuner.model
        specs = model.exit_config.specs(model.backbone.num_layers)
        return {
            "backbone:": model.tensor_hashes,
            "exit at layer": {str(spec.layer): f"{spec.arch}, {spec.head}" for spec in specs},
            "data": {"to tune on": identify(self.train), "held out": identify(self.valid)},
        }


def set_up(
    config: TuneConfig,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    stage: range | None,
    say: Callable[[str], None],
) -> SetUp:
    """Everything that the steps of a run need, on this process of a connected `mesh`.

    dtype: of the backbone, and of the products. stage: see `ee_tuning.tune.timing.own_stage`.

    Raises:
        UserError: see `load_share`, `load_data` and `prepare`.
    """
    model = load_share(config, mesh, device, dtype, stage)
    train, valid = load_data(config, model, mesh)
    say(describe(train, config.steps * config.global_batch_size))
    if config.known_tokens or config.picks_vocabulary:
        reduce_vocabulary(model, train, valid, config, mesh, say)
    prepare(model, config, mesh)
    pipeline = Pipeline(mesh, bool(model.exit_layers))
    transport: Transport = pipeline if mesh.size > 1 or config.trace else Alone()
    autocast = None if dtype == torch.float32 else dtype
    rest: dict[str, Any] = {"clip": config.clip, "autocast": autocast, "transport": transport}
    tuner = Tuner(model, build_optimizers(model, config, config.seed), objective(config), **rest)
    return SetUp(tuner, train, valid, pipeline)


def prepare(model: Network, config: TuneConfig, mesh: Mesh = ONE_PROCESS) -> Network:
    """`model`, on its device, as `config` wants it tuned on this process of a connected `mesh`.

    The backbone is in its precision, and of a pipeline only this process's stage is there.

    Raises:
        UserError: see `split_model` and `check_fp8`.
    """
    split_model(model, mesh, teacher=config.runs_whole, sequence=config.sequence_parallel)
    cast_exits(model, DTYPES[config.master_weights])
    if model.draft:
        model.draft.steps, model.draft.decay = config.draft_steps, config.draft_decay
    if config.exit_precision == "fp8":
        check_fp8("--exit-precision", model.backbone.device)
        tune_in_fp8(model.exits)
    if varlen.can_use(model.model):
        varlen.use_varlen(model)
        model.chain.takes_boundaries = True
    if is_compiled(config, model.backbone.device):
        model.chain.compile(layers=compiles(config.backbone_precision))
        for layer in model.exit_layers:  # else its steps each take as much memory as the logits
            model.exit(layer).output.fuse(model.backbone)
    if config.shard and config.optimizer == "adamw-8bit":
        shard_exits(model, mesh, cuts_no_block)
    elif config.shard:
        shard_exits(model, mesh)
    return model.train()


def cast_exits(model: Network, dtype: torch.dtype) -> None:
    """Let the optimizers keep the exits' weights in `dtype`, in place."""
    for p in model.exits.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)


def is_compiled(precision: Precision, device: torch.device) -> bool:
    """Whether layers and exits are compiled."""
    asked = precision.compile
    return asked == "on" or (asked == "auto" and device.type == "cuda")


def objective(config: ObjectiveConfig) -> Objective:
    """What `config` tunes exits on."""
    names = [field.name for field in dataclasses.fields(Objective)]
    return Objective(**{name: getattr(config, name) for name in names})


def load_share(
    config: TuneConfig,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    stage: range | None,
) -> Network:
    """Exits to tune, of this process's stage, on what they need of the backbone in `dtype`.

    Raises:
        UserError: see `ee_tuning.share.load`; or processes have different
            backbones.
    """
    picks = config.known_tokens or config.picks_vocabulary
    share = Share(
        whole=config.runs_whole,
        stage=stage,
        # Rows of a head are picked from all of it.
        slices=Slices(mesh.axis("tp"), head=not picks) if config.tp > 1 else None,
        shard=mesh.group("dp") if config.shard_backbone else None,
        precision=config.backbone_precision,
        dtype=dtype,
        exit_dtype=torch.float32,
        device=device,
    )
    model = mesh.on_all(lambda: load(source_of(config), share, Network))
    model.tensor_hashes = collect_hashes(model.tensor_hashes, mesh)
    return model


def load_data(config: TuneConfig, model: Network, mesh: Mesh) -> tuple[Rows, Rows]:
    """Packed sequences to tune on, and to validate with.

    Raises:
        UserError: no data, or other data than another process has.
    """
    both = mesh.on_all(lambda: _pack(config, model))
    mesh.check_same("data", digest(*map(_sample, both)))
    return both


def read_tokenizer(config: TuneConfig, model: Network) -> PreTrainedTokenizerBase:
    """That of the run, or the backbone's.

    Raises:
        UserError: there is none, or `model` has exits that know tokens of another one.
    """
    path = config.tokenizer or model.backbone.model.name_or_path
    tokenizer = load_tokenizer(path, model.config.vocab_size, config.trust_remote_code)
    check_names(model.vocabulary, tokenizer, config.exits)
    return tokenizer


def _pack(config: TuneConfig, model: Network) -> tuple[Rows, Rows]:
    """See `load_data`."""
    tokenizer = read_tokenizer(config, model)
    load = (tokenizer, config.seq_length, config.seed, config)
    packed = load_packed(config.data, *load)
    if config.valid_data:
        return packed, load_packed(config.valid_data, *load)
    return split_validation(packed, config.valid_fraction, config.seed)


def digest(*values: Any) -> str:
    """A short text that differs where `values` do."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def identify(data: Rows) -> str:
    """A short text that differs where data do, or how they are read: by template or tokenizer."""
    first = collate(data, range(data.count(IDENTIFYING_ROWS)))
    return digest(contents(data), *(values.tolist() for values in first.values()))


def _sample(data: Rows) -> Any:
    """What tells data, and how many rows are ready with a hash of some, spread evenly."""
    ready = data.count(data.window)
    found = collate(data, range(0, ready, max(1, ready // COMPARED_ROWS)))
    hashes = [hashlib.sha256(values.numpy().tobytes()).hexdigest() for values in found.values()]
    return contents(data), ready, hashes


def reduce_vocabulary(
    model: Network,
    train: Rows,
    valid: Rows,
    config: TuneConfig,
    mesh: Mesh,
    say: Callable[[str], None],
) -> None:
    """Let the exits know only the most frequent tokens of the data, and say what is lost.

    How many is said by `config`, or by the data, for heads of which rows can be picked.
    """

    def batches(data: Rows) -> Iterator[Batch]:
        rows = data.count(max(1, COUNTED_TOKENS // config.seq_length))
        return micro_batches(data, range(rows), 64)

    size = model.backbone.config.vocab_size
    counts = count_tokens(batches(train), size)
    # A stage without exits has no head to look at.
    rows = any(mesh.gather_on_host(isinstance(model.backbone.head, nn.Linear)))
    number = config.known_tokens or (enough(counts) if rows else 0)
    if not number:
        return
    tokens = most_frequent(counts, number)
    model.reduce_vocabulary(tokens)
    vocabulary = model.vocabulary
    assert vocabulary is not None
    vocabulary.names = names_of(tokens, read_tokenizer(config, model))
    labels = torch.cat([batch["labels"].flatten() for batch in batches(valid)])
    lost = (vocabulary.known(labels) == IGNORED).sum() - (labels == IGNORED).sum()
    vocabulary.coverage = 1 - float(lost / (labels != IGNORED).sum().clamp(min=1))
    say(
        f"exits know {len(tokens):,} of {size:,} tokens: {counts[tokens].sum() / counts.sum():.2%} "
        f"of the data's, {vocabulary.coverage:.2%} of the held-out targets; no exit is tuned on or "
        "measured with others"
    )
