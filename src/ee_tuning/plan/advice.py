"""Which flags would make a run fit, and the refusal of what does not."""

from __future__ import annotations

import dataclasses

import torch

from ee_tuning.config import TuneConfig
from ee_tuning.devices import GIB, pick_dtype, readable
from ee_tuning.errors import UserError
from ee_tuning.model import Network
from ee_tuning.plan.check import check_dtype, check_model, check_settings
from ee_tuning.plan.memory import largest_stage
from ee_tuning.plan.shapes import account_of, shapes_of
from ee_tuning.quantise.fp8 import has_fp8

# What makes a run smaller, the cheapest in quality first.
SAVINGS: tuple[dict[str, object], ...] = (
    {"micro_batch_size": 1},
    {"backbone_precision": "fp8"},
    {"optimizer": "adamw-8bit"},
    {"master_weights": "bf16"},
    {"head": "shared"},
)


def refuse_if_too_large(model: Network, config: TuneConfig, available: float) -> None:
    """Refuse, before anything is allocated, what needs more than `available` GiB.

    model: that `config` tunes; may be on the meta device.

    Raises:
        UserError: by how much, and what would help.
    """
    needed = sum(largest_stage(account_of(model, config), config).values())
    more = needed - available * GIB
    fp8 = not torch.cuda.is_available() or has_fp8(torch.device("cuda"))
    if more > 0:
        raise UserError(
            f"this run needs about {readable(needed)}, {readable(more)} more than the GPU "
            f"has; {advice(model, config, available, fp8)}"
        )


def advice(model: Network, config: TuneConfig, available: float, fp8: bool) -> str:
    """Which flags, that `tune` takes, would make `config` fit into `available` GiB.

    fp8: whether the GPU has it.
    """
    flags: list[str] = []
    for saving in SAVINGS:
        if saving == {"backbone_precision": "fp8"} and not fp8:
            saving = {"backbone_precision": "torchao-int8"}
        if all(getattr(config, name) == value for name, value in saving.items()):
            continue
        if "backbone_precision" in saving and config.backbone_precision == "bnb-4bit":
            continue  # smaller already
        if "head" in saving and config.exits:
            continue
        smaller = dataclasses.replace(config, **saving)  # type: ignore[arg-type]
        # Heads are what changes the exits.
        shapes = shapes_of(smaller) if "head" in saving else model
        if not _is_possible(shapes, smaller):
            continue
        model, config = shapes, smaller
        flags += [f"--{name.replace('_', '-')} {value}" for name, value in saving.items()]
        if sum(largest_stage(account_of(model, config), config).values()) / GIB <= available:
            return "it would with " + " ".join(flags)
    tried = f"not even with {' '.join(flags)}: " if flags else ""
    return f"{tried}use fewer or shallower exits, or more GPUs with --pp"


def check_on_gpu(model: Network, config: TuneConfig) -> None:
    """Refuse what `tune` does with this model on a GPU, whatever data and packages it finds.

    Raises:
        UserError: names the setting.
    """
    check_dtype(config, pick_dtype(config.precision, torch.device("cuda")))
    check_model(model, config)


def _is_possible(model: Network, config: TuneConfig) -> bool:
    try:
        check_settings(config)
        check_on_gpu(model, config)
    except UserError:
        return False
    return True
