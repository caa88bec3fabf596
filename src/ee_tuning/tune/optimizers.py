"""AdamW over the exits, its learning rate, clipping per exit, and what a step works with.

An optimizer keeps an exit's parameters in fp32 or bf16, perhaps a part of them; what is multiplied
are `working_copies`, whole and in the dtype of the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ee_tuning.exits import Exit
from ee_tuning.model import Network
from ee_tuning.parallel.data import ShardedParameter
from ee_tuning.slices import SplitParameter
from ee_tuning.tune_config import Schedule

# Of torchao's 8-bit state: values that share a scale, and of how many values one has it at least.
BLOCK, QUANTISED = 256, 4096
WAITING = 2**29  # bytes of a gradient that may wait for a second one

# One per exit layer: an exit is stepped as soon as its gradients are complete.
Optimizers = dict[int, torch.optim.Optimizer]


def build_optimizers(model: Network, schedule: Schedule, seed: int = 0) -> Optimizers:
    """AdamW over each exit; weight decay on matrices, not on norms and biases."""
    return {
        layer: _build_optimizer(model.exit(layer), layer, schedule, seed)
        for layer in model.exit_layers
    }


def _build_optimizer(
    exit: Exit, layer: int, schedule: Schedule, seed: int
) -> torch.optim.Optimizer:
    parameters = [p for p in exit.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    common: dict[str, Any] = {
        "lr": schedule.lr,
        "betas": (schedule.beta1, schedule.beta2),
        "eps": schedule.eps,
    }
    if schedule.optimizer == "adamw-8bit" and parameters:
        groups = [group for group in groups if group["params"]]
        return _adamw_8bit(seed, layer)(groups, **common, bf16_stochastic_round=True)
    return torch.optim.AdamW(groups, **common, fused=all(p.is_cuda for p in parameters))


def _adamw_8bit(seed: int, layer: int) -> Any:
    """torchao's AdamW with 8-bit state, for the exit after `layer`.

    The random bits with which it rounds bf16 weights are a function of (seed, layer, step): a run
    that goes on from a checkpoint rounds as if it had not stopped, and exits tuned together as if
    each were alone. Of weights that are split all ranks round their parts with the same bits, so
    that those that each of them has whole stay the same.

    A part that would cut blocks of the whole keeps its state in the weights' dtype.
    """
    from torchao.optim import AdamW8bit

    class Seeded(AdamW8bit):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            return super()._new_buffer(p, signed) if has_blocks(p) else torch.zeros_like(p)

        def step(self, closure: Any = None) -> Any:
            parameters = [p for group in self.param_groups for p in group["params"]]
            # torchao counts steps on the host, whatever device the state is on.
            done = max((int(self.state[p].get("step", 0)) for p in parameters), default=0)
            devices = {p.device for p in parameters if p.is_cuda}
            with torch.random.fork_rng(devices):
                torch.manual_seed(((seed * 100_003 + layer) * 10_000_019 + done) % 2**63)
                return super().step(closure)

    return Seeded


def has_blocks(p: Tensor, parts: int = 1) -> bool:
    """Whether the 8-bit state of `p`, or of so many parts of it along its first dim, is quantised.

    It is where torchao does so with the whole parameter, if blocks of that are in one part each.
    """
    dims = [cut.dim for cut in p.cuts] if isinstance(p, SplitParameter) else []
    together = p.shape[max(dims, default=0) :].numel()  # values next to each other in the whole
    if not max(dims, default=0):
        together //= parts
    return p.numel() // parts >= QUANTISED and together % BLOCK == 0


def cuts_no_block(p: Tensor, parts: int) -> bool:
    """Whether the 8-bit state of so many parts of `p`, cut along its first dim, is that of `p`."""
    return not has_blocks(p) or has_blocks(p, parts)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, which an 8-bit optimizer keeps in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(schedule: Schedule, step: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then cosine or linear decay."""
    warmup = schedule.warmup if schedule.warmup >= 1 else schedule.warmup * schedule.steps
    if step < warmup:
        return schedule.lr * (step + 1) / (math.ceil(warmup) + 1)
    progress = (step - warmup) / max(1, schedule.steps - warmup)
    left = 1 - progress if schedule.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return schedule.last_lr + (schedule.lr - schedule.last_lr) * left


def loss_weights(schedule: Schedule, layers: list[int], step: int) -> dict[int, float]:
    """The loss weight of each exit at `step`, warm-up from `loss_weight_start` included."""
    done = 1.0 if schedule.loss_weight_warmup == 0 else min(1.0, step / schedule.loss_weight_warmup)
    factor = schedule.loss_weight_start + (1 - schedule.loss_weight_start) * done
    values = schedule.loss_weights or [1.0] * len(layers)
    return {layer: factor * value for layer, value in zip(layers, values, strict=True)}


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The norm of the gradients of `parameters`, all of which are here."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(
    exit: Exit, largest: float, norm_of: Callable[[Sequence[Tensor]], Tensor] = gradient_norm
) -> Tensor:
    """Clip an exit's gradients by that exit's own norm; gives the norm before.

    Per exit, so that exits tuned together are the same as exits tuned alone.
    """
    parameters = [p for p in exit.parameters() if p.grad is not None]
    norm = norm_of(parameters)
    torch.nn.utils.clip_grads_with_norm_(parameters, largest if largest > 0 else math.inf, norm)
    return norm


# -- working copies --------------------------------------------------------------------------------


@contextmanager
def working_copies(exit: Exit, dtype: torch.dtype | None) -> Iterator[HandedOver]:
    """Inside, the exit's matrices are whole and in the dtype they are multiplied in.

    They are cast, and gathered if they are sharded, only once. The gradients of the copies are
    added to those of the parameters, in the parameters' dtype: see `HandedOver`.
    """
    gradients = HandedOver()
    swapped = [
        (module._parameters, name, p)
        for module in exit.modules()
        for name, p in module._parameters.items()
        if p is not None and p.requires_grad and _needs_copy(p, dtype)
    ]
    for parameters, name, p in swapped:
        cast = p.detach().to(dtype if p.dim() >= 2 else p.dtype)
        gathered = p.together(cast) if isinstance(p, ShardedParameter) else cast
        parameters[name] = torch.nn.Parameter(gathered)
        parameters[name].register_post_accumulate_grad_hook(partial(gradients.take, p))  # type: ignore[union-attr]
    try:
        yield gradients
        gradients.add_rest()
    finally:
        for parameters, name, p in swapped:
            parameters[name] = p


def _needs_copy(p: Tensor, dtype: torch.dtype | None) -> bool:
    is_cast = dtype is not None and p.dim() >= 2 and p.dtype != dtype
    return is_cast or isinstance(p, ShardedParameter)


class HandedOver:
    """Gradients of working copies on their way to the parameters.

    Adding one to a sum in fp32 reads and writes the whole sum, so two wait for each other, if they
    are not larger than `WAITING`, and are added in one pass: one after the other, in fp32.
    """

    def __init__(self) -> None:
        self._waiting: dict[Tensor, list[Tensor]] = {}

    def take(self, p: Tensor, copy: Tensor) -> None:
        """Called by autograd with the copy of `p` that has just got its gradient."""
        assert copy.grad is not None
        waiting = self._waiting.setdefault(p, [])
        waiting.append(copy.grad)
        copy.grad = None
        # In autograd's own thread: nothing is compiled here.
        if len(waiting) > 2 or waiting[0].nbytes > WAITING:
            _add(p, waiting.pop(0))

    def add_pairs(self, fused: bool) -> None:
        """Add those of which there are two. fused: compile the sum."""
        for p, waiting in self._waiting.items():
            if len(waiting) == 2:
                _add(p, *waiting, fused=fused)
                waiting.clear()

    def add_rest(self) -> None:
        """Add all that still wait."""
        for p, waiting in self._waiting.items():
            for gradient in waiting:
                _add(p, gradient)
        self._waiting.clear()


def _add(p: Tensor, *gradients: Tensor, fused: bool = False) -> None:
    """Add `gradients` to that of `p`, in its dtype, one after the other."""
    kept = "whole_grad" if isinstance(p, ShardedParameter) else "grad"
    given = [getattr(p, kept), *gradients]
    if fused and all(x is None or x.is_contiguous() for x in given):
        flat = [None if x is None else x.view(-1) for x in given]
        setattr(p, kept, _compiled_sum()(*flat, p.dtype).view(gradients[0].shape))
    else:
        setattr(p, kept, _sum(*given, dtype=p.dtype))


def _sum(total: Tensor | None, *gradients: Tensor, dtype: torch.dtype) -> Tensor:
    for gradient in gradients:
        total = gradient.to(dtype) if total is None else total.add_(gradient)
    assert total is not None
    return total


def _sum_of_two(total: Tensor | None, one: Tensor, two: Tensor, dtype: torch.dtype) -> Tensor:
    return _sum(total, one, two, dtype=dtype)


@cache
def _compiled_sum() -> Callable[..., Tensor]:
    """`_sum_of_two` in one pass, for all sizes."""
    return torch.compile(_sum_of_two, dynamic=True)
