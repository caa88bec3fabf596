"""Which settings cannot work, alone or together."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import nn

from ee_tuning.config import PlanConfig, TuneConfig
from ee_tuning.errors import Notice, UserError
from ee_tuning.exit_config import drafts_alone
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import own_rank
from ee_tuning.parallel.tensor import check_splits
from ee_tuning.plan.gpus import GPUS
from ee_tuning.quantise.packages import check_installed, check_package, nothing_to_quantise
from ee_tuning.settings import changed
from ee_tuning.tune_config import Precision
from ee_tuning.vocabulary import check_number

NOT_NEGATIVE = (
    "warmup", "weight_decay", "clip", "loss_weight_start", "loss_weight_warmup", "save_every",
    "eval_every",
)  # fmt: skip
OF_LOSSES = {  # settings that other losses ignore
    "kl_temperature": ("kl", "mixed"), "kl_weight": ("mixed",),
    "acceptance_weight": ("acceptance",),
}  # fmt: skip


def check(config: TuneConfig) -> None:
    """Refuse settings that cannot work before anything is loaded; name those that are ignored.

    Raises:
        UserError: names the setting.
    """
    if not config.data:
        if config.resume and not config.out:
            raise UserError("no run to go on with given: name its folder with --out")
        nothing = f"there is no run in {config.out!r} to go on with, and " if config.resume else ""
        raise UserError(f"{nothing}no data given: name files, folders or hub ids with --data")
    if config.resume and config.overwrite:
        raise UserError("resume and overwrite exclude each other: leave one out")
    check_settings(config)
    check_installed(config.backbone_precision)
    if config.optimizer == "adamw-8bit":
        check_package("torchao", "--optimizer adamw-8bit")
    if config.log_to != "none":
        check_package(config.log_to, f"--log-to {config.log_to}")
    if own_rank() == 0:
        others = [key for key, losses in OF_LOSSES.items() if config.loss not in losses]
        _warn_ignored(config, f"loss {config.loss}", others)
        if not (config.drafts or config.exits):
            _warn_ignored(config, "a run without a draft exit", ["draft_steps", "draft_decay"])
        if config.valid_data:
            _warn_ignored(config, "a run with valid_data", ["valid_fraction"])
        if not config.loss_weight_warmup:
            _warn_ignored(config, "a run without loss_weight_warmup", ["loss_weight_start"])


def _warn_ignored(config: TuneConfig, what: str, keys: list[str]) -> None:
    """Name those of `keys` that are not as by default, though `what` ignores them."""
    if given := changed(config, keys):
        warnings.warn(f"{what} ignores {' and '.join(given)}", Notice, stacklevel=2)


def check_plan(config: PlanConfig) -> PlanConfig:
    """`config` with its data-parallel ranks, if it is a run that can be planned.

    Raises:
        UserError: a GPU that is not known, settings that `tune` refuses, or a layout whose memory
            is not counted.
    """
    if config.gpu not in GPUS:
        raise UserError(f"gpu {config.gpu!r} is unknown: use one of {', '.join(GPUS)}")
    if config.shard or config.shard_backbone:
        raise UserError("plan knows neither --shard nor --shard-backbone: leave them out")
    check_counts(config, "gpus", "tp", "pp")
    if config.tokens < 0:
        raise UserError(f"tokens is {config.tokens}: it must be at least 0")
    config = dataclasses.replace(config, dp=_data_parallel(config))
    check_settings(config)
    return config


def _data_parallel(config: PlanConfig) -> int:
    """Data-parallel ranks: those given, or as many as the GPUs make.

    Raises:
        UserError: --dp, --tp and --pp do not take all GPUs, or more.
    """
    ranks = config.tp * config.pp
    if not config.dp and config.gpus % ranks:
        parts_of = f"{config.pp} pipeline stages of {config.tp} tensor-parallel ranks"
        raise UserError(f"{config.gpus} GPUs cannot be divided into {parts_of}")
    if config.dp and config.dp * ranks != config.gpus:
        raise UserError(
            f"dp {config.dp} × tp {config.tp} × pp {config.pp} is {config.dp * ranks}, not gpus, "
            f"{config.gpus}: leave --dp out, or let --gpus be the product"
        )
    return config.dp or config.gpus // ranks


def check_settings(config: TuneConfig) -> None:
    """Refuse settings that cannot work with any model, data or machine.

    Raises:
        UserError: names the setting.
    """
    new = bool(config.layers) or drafts_alone(config.layers, config.arch)
    if bool(config.exits) == new:
        raise UserError("give either --exits or --layers: one says which exits to tune")
    counts = "steps", "seq_length", "micro_batch_size", "global_batch_size", "keep", "log_every"
    check_counts(config, "draft_steps")
    check_counts(config, *counts, "dp", "tp", "pp", "eval_batches")
    if config.seq_length < 2:
        raise UserError("seq_length is 1: a token needs another one before it")
    if config.master_weights == "bf16" and config.optimizer != "adamw-8bit":
        raise UserError(
            "master_weights bf16 needs an optimizer that rounds stochastically: add "
            "--optimizer adamw-8bit"
        )
    for key in ("lr", "eps", "kl_temperature"):
        if getattr(config, key) <= 0:
            raise UserError(f"{key} is {getattr(config, key)}: it must be above 0")
    for key in NOT_NEGATIVE:
        if getattr(config, key) < 0:
            raise UserError(f"{key} is {getattr(config, key)}: it must be at least 0")
    if not all(weight >= 0 for weight in config.loss_weights):
        raise UserError(f"loss_weights are {config.loss_weights}: each must be at least 0")
    if not 0 <= config.last_lr <= config.lr:
        raise UserError(
            f"min_lr is {config.min_lr}: the learning rate falls to it from lr, so it must be "
            f"within [0, {config.lr}]"
        )
    for key in changed(config, ("init", "arch", "head")) if config.exits else ():
        raise UserError(
            f"{key} is {getattr(config, key)}: it is for new exits, not for those in --exits"
        )
    check_parallel(config)
    if config.global_batch_size < config.dp:
        raise UserError(
            f"global_batch_size {config.global_batch_size} is less than dp {config.dp}: each "
            "data-parallel rank needs a sequence"
        )
    if config.trace and config.steps == 1:
        raise UserError("trace draws the second step of a run: it needs --steps 2 or more")
    if config.stage_layers and config.pp == 1:
        raise UserError("stage_layers needs --pp: a single stage has all layers")
    if config.balance == "measured" and (config.pp == 1 or config.stage_layers):
        raise UserError("balance measured needs --pp, and no --stage-layers: nothing to balance")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(config, key) < 1:
            raise UserError(f"{key} is {getattr(config, key)}: it must be at least 0 and below 1")
    for key in ("kl_weight", "acceptance_weight", "draft_decay", "valid_fraction"):
        if not 0 <= getattr(config, key) <= 1:
            raise UserError(f"{key} is {getattr(config, key)}: it must be within [0, 1]")


def check_counts(config: TuneConfig, *keys: str) -> None:
    """Refuse settings that count something and are below 1.

    Raises:
        UserError: names the setting.
    """
    for key in keys:
        if getattr(config, key) < 1:
            raise UserError(f"{key} is {getattr(config, key)}: it must be at least 1")


def check_dtype(config: Precision, dtype: torch.dtype) -> None:
    """Refuse what cannot be had with a backbone in `dtype`.

    Raises:
        UserError: bf16 weights that would be multiplied in fp32.
    """
    if config.master_weights == "bf16" and dtype == torch.float32:
        raise UserError("master_weights bf16 needs --precision bf16, it is fp32 here")


def check_length(seq_length: int, context: int | None) -> None:
    """Refuse sequences that are longer than a backbone's context, None: which has no end.

    Raises:
        UserError: they are.
    """
    if context and seq_length > context:
        raise UserError(
            f"seq_length {seq_length} is beyond the backbone's context of {context}: "
            "lower --seq-length"
        )


def check_model(model: Network, config: TuneConfig) -> None:
    """Refuse settings that cannot work with this model, which may be on the meta device.

    Raises:
        UserError: names the setting, or there is nothing to tune.
    """
    backbone, exits = model.backbone, len(model.all_exit_layers)
    check_length(config.seq_length, backbone.context)
    if config.loss_weights and len(config.loss_weights) != exits:
        raise UserError(f"{len(config.loss_weights)} loss_weights, exits: {exits}; give one each")
    if not any(p.requires_grad for p in model.exits.parameters()):
        raise UserError("nothing to tune: embedding exits with a shared head have no parameters")
    if model.draft and config.shard_backbone and config.start == "fitted" and not config.exits:
        raise UserError(
            "a draft exit cannot be fitted with --shard-backbone: it runs whole layers; use "
            "--init copy"
        )
    linear = any(type(m) is nn.Linear for layer in backbone.layers for m in layer.modules())
    if config.backbone_precision != "same" and not linear:
        raise nothing_to_quantise(backbone.model, config.backbone_precision)
    check_splits(backbone, config.tp)
    _check_vocabulary(model, config)


def _check_vocabulary(model: Network, config: TuneConfig) -> None:
    known = len(model.vocabulary.tokens) if model.vocabulary else config.known_tokens
    if not known:
        return
    check_number(known, model.backbone.config.vocab_size)
    if config.known_tokens not in (0, known):
        raise UserError(
            f"exit_vocab is {config.exit_vocab}: the exits in {config.exits} know {known} tokens "
            "already; leave --exit-vocab out"
        )
    if known % config.tp:
        raise UserError(f"tp is {config.tp}: it must divide the tokens that exits know, {known}")
    check_parallel(dataclasses.replace(config, exit_vocab=known))


def check_parallel(config: TuneConfig) -> None:
    """Refuse what cannot be had with matrices that are split, or exits that are sharded.

    Raises:
        UserError: names both.
    """
    tp, shard = ("--tp", config.tp > 1), ("--shard", config.shard)
    frozen, alone = ("--shard-backbone", config.shard_backbone), ("--dp 1", config.dp == 1)
    sequence = ("--sequence-parallel", config.sequence_parallel)
    precision = config.backbone_precision
    kept = (f"--backbone-precision {precision}", precision != "same")
    packed = ("--backbone-precision " + precision, precision not in ("same", "fp8"))
    scales = "its package keeps a matrix in whole rows or blocks, which it does not cut"
    refused = [
        (tp, packed, scales),
        (frozen, kept, "matrices are gathered in the dtype of the checkpoint"),
        (alone, shard, "there is no other rank to share with"),
        (alone, frozen, "there is no other rank to share with"),
        (("--tp 1", config.tp == 1), sequence, "there is no other rank to share with"),
    ]
    if config.sequence_parallel and config.seq_length % config.tp:
        raise UserError(
            f"seq_length {config.seq_length} cannot be split by --sequence-parallel: tp, "
            f"{config.tp}, must divide it"
        )
    for (one, has_one), (other, has_other), reason in refused:
        if has_one and has_other:
            raise UserError(f"{other} cannot be had with {one}: {reason}; leave one of them out")
