"""Which device, which precision and which versions a run uses."""

from __future__ import annotations

import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ee_tuning.errors import Notice, UserError, first_line
from ee_tuning.quantise.fp8 import has_fp8
from ee_tuning.tune_config import Precision
from ee_tuning.version import __version__

MIB, GIB = 2**20, 2**30  # bytes


def readable(size: float) -> str:
    """Bytes as one says them: in GiB, less than a tenth of one in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sent(values: Any, device: torch.device) -> Tensor:
    """Values on a device, for what it is given next: where `torch.tensor(values, device=…)` waits
    until it has done all that it was given before."""
    return torch.as_tensor(values).to(device, non_blocking=True)


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU if there is one.

    Raises:
        UserError: the device asked for is none, or not there.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"device {name!r} is unknown: give cpu, cuda, cuda:1 for the second GPU, or auto"
        ) from error
    rank = os.environ.get("LOCAL_RANK")  # torchrun: one GPU per process
    number = int(name.partition(":")[2] or rank or 0)  # torch's own index of 300 is 44
    if device.type == "cuda" and 0 < there <= number:
        raise UserError(
            f"device {name!r} cannot be used: there is no cuda:{number}, the last GPU here is "
            f"cuda:{there - 1}"
        )
    try:
        if device.type == "cuda" and rank and there:
            torch.cuda.set_device(int(rank))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        why, *_ = first_line(error).split(". ")  # a list of all that torch knows may follow
        raise UserError(f"device {name!r} cannot be used: {why}; use --device cpu") from error
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The backbone's dtype: ``auto`` is bf16 on a GPU and fp32 on CPU.

    Raises:
        UserError: no such precision.
    """
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    known = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in known:
        raise UserError(f"precision {precision!r} is unknown: use one of auto, {', '.join(known)}")
    return known[precision]


def check_precisions(config: Precision, device: torch.device) -> None:
    """Refuse, before anything is loaded, what a GPU cannot compute in.

    Raises:
        UserError: bf16 before compute capability 8.0 (Ampere), fp8 before 8.9; says what to use.
    """
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if pick_dtype(config.precision, device) == torch.bfloat16 and found < (8, 0):
        raise UserError(
            f"{_name(device)} cannot compute in bf16, which takes 8.0: use --precision fp32"
        )
    for setting in ("backbone_precision", "exit_precision"):
        if getattr(config, setting) == "fp8":
            check_fp8(f"--{setting.replace('_', '-')}", device)


def check_fp8(setting: str, device: torch.device) -> None:
    """Refuse fp8 on a GPU without fp8 matrix units, and warn elsewhere that it saves no time.

    Raises:
        UserError: says what to use.
    """
    if has_fp8(device):
        return
    if device.type == "cuda":
        instead = "torchao-int8 (the same memory)" if "backbone" in setting else "same"
        raise UserError(
            f"{_name(device)} has no fp8 matrix units, which came with 8.9: use {setting} {instead}"
        )
    warnings.warn(
        f"{setting} fp8: {device} has no fp8 matrix units, so weights are rounded to fp8 but "
        "products are no faster",
        Notice,
        stacklevel=2,
    )


def _name(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on `device`, None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
    return int(found[0]) * 1024 if found else None


def hardware(device: torch.device) -> str:
    """What `device` is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({_cpu_name()}), {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> str:
    """What ran, for every figure and every run that is kept."""
    return (
        f"ee-tuning {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
