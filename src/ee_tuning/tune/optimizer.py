"""AdamW over the exits, its learning rate, and clipping per exit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ee_tuning.config import TuneConfig
from ee_tuning.model import EarlyExitModel


def build_optimizer(model: EarlyExitModel, config: TuneConfig) -> torch.optim.AdamW:
    """AdamW over the exits' parameters; weight decay on matrices, not on norms and biases."""
    parameters = list(model.exits.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=model.backbone.device.type == "cuda",
    )


def learning_rate(config: TuneConfig, step: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then cosine or linear decay."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * config.steps
    if step < warmup:
        return config.lr * (step + 1) / (math.ceil(warmup) + 1)
    progress = (step - warmup) / max(1, config.steps - warmup)
    left = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


def loss_weights(config: TuneConfig, layers: list[int], step: int) -> dict[int, float]:
    """The loss weight of each exit at `step`, warm-up from `loss_weight_start` included."""
    done = 1.0 if config.loss_weight_warmup == 0 else min(1.0, step / config.loss_weight_warmup)
    factor = config.loss_weight_start + (1 - config.loss_weight_start) * done
    values = config.loss_weights or [1.0] * len(layers)
    return {layer: factor * value for layer, value in zip(layers, values, strict=True)}


def clip_gradients(model: EarlyExitModel, largest: float) -> dict[int, Tensor]:
    """Clip each exit's gradients by that exit's own norm; gives the norms before.

    Per exit, so that exits tuned together are the same as exits tuned alone.
    """
    limit = largest if largest > 0 else math.inf
    return {
        layer: torch.nn.utils.clip_grad_norm_(model.exit(layer).parameters(), limit)
        for layer in model.exit_layers
    }
