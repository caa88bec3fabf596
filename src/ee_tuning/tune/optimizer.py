"""AdamW over the exits, its learning rate, and clipping per exit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ee_tuning.config import TuneConfig
from ee_tuning.exits import Exit
from ee_tuning.model import EarlyExitModel
from ee_tuning.parallel.tensor import total_norm

# One per exit layer: an exit is stepped as soon as its gradients are complete.
Optimizers = dict[int, torch.optim.Optimizer]


def build_optimizers(model: EarlyExitModel, config: TuneConfig) -> Optimizers:
    """AdamW over each exit; weight decay on matrices, not on norms and biases."""
    return {
        layer: _build_optimizer(model.exit(layer), layer, config) for layer in model.exit_layers
    }


def _build_optimizer(exit: Exit, layer: int, config: TuneConfig) -> torch.optim.Optimizer:
    parameters = [p for p in exit.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }
    if config.optimizer == "adamw-8bit" and parameters:
        groups = [group for group in groups if group["params"]]
        return _adamw_8bit(config.seed, layer)(groups, **common, bf16_stochastic_round=True)
    return torch.optim.AdamW(groups, **common, fused=all(p.is_cuda for p in parameters))


def _adamw_8bit(seed: int, layer: int) -> Any:
    """torchao's AdamW with 8-bit state, for the exit after `layer`.

    The random bits with which it rounds bf16 weights are a function of (seed, layer, step): a run
    that goes on from a checkpoint rounds as if it had not stopped, and exits tuned together as if
    each were alone.
    """
    from torchao.optim import AdamW8bit

    class Seeded(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            parameters = [p for group in self.param_groups for p in group["params"]]
            # torchao counts steps on the host, whatever device the state is on.
            done = max((int(self.state[p].get("step", 0)) for p in parameters), default=0)
            devices = {p.device for p in parameters if p.is_cuda}
            with torch.random.fork_rng(devices):
                torch.manual_seed(((seed * 100_003 + layer) * 10_000_019 + done) % 2**63)
                return super().step(closure)

    return Seeded


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, which an 8-bit optimizer keeps in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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


def clip_gradients(exit: Exit, largest: float) -> Tensor:
    """Clip an exit's gradients by that exit's own norm; gives the norm before.

    Per exit, so that exits tuned together are the same as exits tuned alone.
    """
    parameters = [p for p in exit.parameters() if p.grad is not None]
    norm = total_norm(parameters)
    torch.nn.utils.clip_grads_with_norm_(parameters, largest if largest > 0 else math.inf, norm)
    return norm
