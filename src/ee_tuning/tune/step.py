"""One tuning step: backbone without gradients, then exit by exit forward, loss, backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_tuning.backbone import State
from ee_tuning.losses import LossSum, count_labels, cross_entropy, distillation
from ee_tuning.model import EarlyExitModel

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """What an exit is tuned on: see the settings of the same names in `TuneConfig`."""

    loss: str = "ce"
    kl_temperature: float = 1.0
    kl_weight: float = 0.5
    dynamic_weights: bool = False

    @property
    def needs_teacher(self) -> bool:
        """Whether the final exit's logits are needed, and so the whole backbone."""
        return self.loss != "ce"

    def __call__(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> LossSum:
        """Summed loss of logits (B, T, V) on labels (B, T)."""
        terms = []
        if self.loss != "kl":
            weight = 1.0 if self.loss == "ce" else 1 - self.kl_weight
            terms.append((weight, cross_entropy(logits, labels, self.dynamic_weights)))
        if self.loss != "ce":
            assert teacher is not None
            weight = 1.0 if self.loss == "kl" else self.kl_weight
            args = (logits, teacher, labels, self.kl_temperature, self.dynamic_weights)
            terms.append((weight, distillation(*args)))
        total = torch.stack([weight * term.total for weight, term in terms]).sum()
        return LossSum(total, terms[0][1].count)


def exit_losses(
    model: EarlyExitModel, batch: Batch, objective: Objective
) -> Iterator[tuple[int, LossSum]]:
    """(exit layer, summed loss) of a micro-batch, by depth.

    Lazy: the next exit is computed when asked for, so the logits of one exit at most are alive.
    """
    states: Iterator[tuple[int, State]] | list[tuple[int, State]]
    states = model.states(batch["input_ids"], batch["position_ids"], to_end=objective.needs_teacher)
    teacher = None
    if objective.needs_teacher:
        states = list(states)
        with torch.no_grad():
            teacher = model.backbone.final_logits(states[-1][1].hidden)
    for layer, state in states:
        if layer in model.exit_layers:
            yield layer, objective(model.exit(layer)(state), batch["labels"], teacher)


def accumulate_gradients(
    model: EarlyExitModel,
    micro_batches: list[Batch],
    objective: Objective,
    weights: dict[int, float],
    autocast: torch.dtype | None = None,
) -> dict[int, Tensor]:
    """Add the gradients of a global batch to the exits; gives the mean loss per exit.

    Losses are sums, divided by the labelled tokens of the whole global batch, so micro-batches
    with unequal numbers of them count by their tokens. weights: loss weight per exit layer.
    """
    device = model.backbone.device
    count = torch.stack([count_labels(batch["labels"]) for batch in micro_batches]).sum()
    count = count.clamp(min=1).to(device)
    means = {layer: torch.zeros((), device=device) for layer in model.exit_layers}
    for cpu_batch in micro_batches:
        batch = {name: values.to(device, non_blocking=True) for name, values in cpu_batch.items()}
        losses = exit_losses(model, batch, objective)
        while True:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                layer, loss = next(losses, (None, None))
            if layer is None or loss is None:
                break
            (weights[layer] * loss.total / count).backward()
            means[layer] += loss.total.detach() / count
    return means


@torch.no_grad()
def mean_losses(
    model: EarlyExitModel, batches: Iterable[Batch], autocast: torch.dtype | None = None
) -> dict[int, float]:
    """Mean cross-entropy per exit over `batches`, in nats per token."""
    device = model.backbone.device
    totals = {layer: torch.zeros((), device=device) for layer in model.exit_layers}
    count = torch.zeros((), device=device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        for cpu_batch in batches:
            batch = {name: values.to(device) for name, values in cpu_batch.items()}
            count += count_labels(batch["labels"])
            for layer, loss in exit_losses(model, batch, Objective()):
                totals[layer] += loss.total
    return {layer: (total / count.clamp(min=1)).item() for layer, total in totals.items()}
