"""Frozen layers in fewer bits: `fp8` by torch itself, `packages` by torchao and bitsandbytes."""

from __future__ import annotations

import torch
from torch import nn

from ee_tuning.quantise.fp8 import freeze_in_fp8
from ee_tuning.quantise.packages import (
    check_installed,
    compiles,
    nothing_to_quantise,
    quantise_layer,
)

__all__ = ["check_installed", "compiles", "nothing_to_quantise", "quantise"]


def quantise(layer: nn.Module, precision: str, dtype: torch.dtype) -> int:
    """Keep the weight of every `nn.Linear` in a frozen layer in `precision`, in place.

    dtype: of its products with 4-bit weights. Gives their number.
    """
    if precision == "fp8":
        return freeze_in_fp8(layer)
    return quantise_layer(layer, precision, dtype)
