"""What GPUs can do by their datasheets, and how much of it a tuning step reaches."""

from __future__ import annotations

from dataclasses import dataclass

from ee_tuning.quantise.packages import PACKAGES
from ee_tuning.tune_config import Precision


@dataclass(frozen=True)
class Gpu:
    """memory: usable GiB; fp32 (without tf32), bf16, fp8: dense TFLOP/s of the datasheet, 0
    without units; TB/s."""

    memory: float
    fp32: float
    bf16: float
    fp8: float
    bandwidth: float


GPUS = {
    "b200": Gpu(178, 80, 2250, 4500, 8.0),
    "h200": Gpu(139, 67, 989, 1979, 4.8),
    "h100": Gpu(79, 67, 989, 1979, 3.35),
    "a100-80": Gpu(79, 19.5, 312, 0, 2.0),
    "a100-40": Gpu(39, 19.5, 312, 0, 1.55),
    "l40s": Gpu(44, 91.6, 362, 733, 0.86),
    "5090": Gpu(31, 105, 210, 419, 1.79),
    "4090": Gpu(23.5, 82.6, 165, 330, 1.0),
    "3090": Gpu(23.5, 35.6, 71, 0, 0.94),
}
# Shares of the datasheet's rates that the parts of a step reached on an H200, and on an H100: what
# the packages keep quantised, of bf16's rate. That of fp32 was not measured: it is taken to be
# bf16's.
REACHED = {
    "fp32": 0.58, "bf16": 0.58, "fp8": 0.45, "bandwidth": 0.8,
    "torchao-int8": 0.58, "bnb-8bit": 0.24, "bnb-4bit": 0.45,
}  # fmt: skip
# Least seconds of one product with all that goes with it (its share of norms, attention and
# activations, and of the host's work between kernels), however few tokens a micro-batch has: in a
# frozen layer, and in an exit, forward or backward. Fitted to 135m-mlp.json and 135m-layer.json of
# benchmarks/results: 30 layers of width 576, exits after 10, 15 and 20, one H100, micro-batches of
# 2,048 tokens. The 42 products that three `layer` exits have more give the second, what is left
# for 20 layers of 7 products the first. It is mostly the host's time, so it is taken to be that of
# any GPU.
LAUNCH = {"frozen": 59e-6, "tuned": 398e-6}


def rates(config: Precision, gpu: Gpu) -> dict[str, float]:
    """FLOP per second of the products of frozen layers, of exits, and of a shared head."""
    dtype = "fp32" if config.precision == "fp32" else "bf16"
    plain = getattr(gpu, dtype) * REACHED[dtype]
    by_precision = {"same": plain, "fp8": gpu.fp8 * REACHED["fp8"] or plain}
    by_precision |= {name: getattr(gpu, dtype) * REACHED[name] for name in PACKAGES}
    frozen = by_precision[config.backbone_precision]
    # Of the frozen parts the packages quantise the layers alone.
    head = plain if config.backbone_precision in PACKAGES else frozen
    tuned = by_precision[config.exit_precision]
    return {"frozen": frozen * 1e12, "tuned": tuned * 1e12, "shared head": head * 1e12}


def bytes_per_second(gpu: Gpu) -> float:
    """What reading and writing memory reaches."""
    return gpu.bandwidth * REACHED["bandwidth"] * 1e12
