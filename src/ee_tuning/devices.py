"""Which device and which precision a run uses."""

from __future__ import annotations

import torch

from ee_tuning.errors import UserError, first_line


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU if there is one.

    Raises:
        UserError: the device asked for is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} cannot be used: {first_line(error)}; use --device cpu"
        ) from error
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The backbone's dtype: ``auto`` is bf16 on a GPU and fp32 on CPU."""
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
