"""One tuning step: backbone without gradients, then exit by exit forward, loss, backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from ee_tuning.backbone import State
from ee_tuning.costs import runs_side_by_side, state_bytes
from ee_tuning.exits import Exit
from ee_tuning.losses import (
    LOGITS,
    SOFTMAX,
    LossSum,
    Softmax,
    count_labels,
    cross_entropy,
    distillation,
)
from ee_tuning.model import Descent, EarlyExitModel
from ee_tuning.parallel.data import GradientSum, ShardedParameter
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.pipeline import Pipeline
from ee_tuning.tune.copies import working_copies
from ee_tuning.tune.optimizer import Optimizers, clip_gradients
from ee_tuning.varlen import boundaries

Batch = dict[str, Tensor]
ONE_PROCESS = Pipeline(Mesh())


@dataclass(frozen=True)
class Objective:
    """What an exit is tuned on: see the settings of the same names in `TuneConfig`."""

    loss: str = "ce"
    kl_temperature: float = 1.0
    kl_weight: float = 0.5
    dynamic_weights: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is cross-entropy without weights."""
        return self.loss == "ce" and not self.dynamic_weights

    @property
    def needs_teacher(self) -> bool:
        """Whether the final exit's logits are needed, and so the whole backbone."""
        return self.loss != "ce"

    def __call__(
        self, logits: Tensor, labels: Tensor, teacher: Tensor | None, softmax: Softmax = SOFTMAX
    ) -> LossSum:
        """Summed loss of logits (B, T, V) on labels (B, T)."""
        terms = []
        if self.loss != "kl":
            weight = 1.0 if self.loss == "ce" else 1 - self.kl_weight
            terms.append((weight, cross_entropy(logits, labels, self.dynamic_weights, softmax)))
        if self.loss != "ce":
            assert teacher is not None
            weight = 1.0 if self.loss == "kl" else self.kl_weight
            args = (logits, teacher, labels, self.kl_temperature, self.dynamic_weights, softmax)
            terms.append((weight, distillation(*args)))
        total = torch.stack([weight * term.total for weight, term in terms]).sum()
        return LossSum(total, terms[0][1].count)


def exit_losses(
    model: EarlyExitModel,
    batch: Batch,
    objective: Objective,
    scales: dict[int, Tensor] | None = None,
    pipeline: Pipeline = ONE_PROCESS,
) -> Iterator[tuple[int, LossSum]]:
    """(exit layer, summed loss) of a micro-batch, by depth, without a graph.

    With `scales`, the gradients of each loss times its scale are added to its exit. Lazy: the
    next exit is computed when asked for, and its logits exist for `LOGITS` values at a time. A
    stage of a pipeline runs its layers at once, so that the next stage can begin.
    """
    descent = pipeline.enter(model, batch)
    return _losses(model, descent, batch["labels"], objective, scales)


def _losses(
    model: EarlyExitModel,
    descent: Descent,
    labels: Tensor,
    objective: Objective,
    scales: dict[int, Tensor] | None,
) -> Iterator[tuple[int, LossSum]]:
    """`exit_losses` of a micro-batch that is on its way down."""
    teacher = None
    if objective.needs_teacher:
        final = descent.ahead(model.backbone.num_layers)
        teacher = _teacher(model, model.chain.part.gather(final) if model.chain.part else final)
    for layer in model.exit_layers:
        scale = scales[layer] if scales else None
        yield layer, _exit_loss(model, layer, descent.to(layer), labels, objective, teacher, scale)


def _exit_loss(
    model: EarlyExitModel,
    layer: int,
    state: State,
    labels: Tensor,
    objective: Objective,
    teacher: Callable[[int, int], Tensor] | None,
    scale: Tensor | None,
) -> LossSum:
    """One exit's loss on labels (B, T), chunk after chunk of the tokens; see `exit_losses`.

    A chunk's gradients go through the head at once, and through the rest of the exit together at
    the end. teacher: see `_teacher`.
    """
    exit = model.exit(layer)
    loss_of = _compiled(_loss) if model.chain.compiled else _loss
    features = exit_features(model, layer, state)
    gradient = torch.zeros_like(features) if scale is not None and features.requires_grad else None
    total = torch.zeros((), device=labels.device)
    for tokens in _chunks(labels, exit.output.softmax.share(exit.output.size)):
        chunk = features.detach()[:, tokens].requires_grad_(gradient is not None)
        target = teacher(tokens.start, tokens.stop) if teacher else None
        loss = loss_of(exit, chunk, labels[:, tokens], target, objective)
        total += loss.detach()
        if scale is not None and loss.requires_grad:  # not of an exit without parameters
            _backward(scale * loss)
        if gradient is not None:
            assert chunk.grad is not None
            gradient[:, tokens] += chunk.grad
    if gradient is not None:
        _backward(features, gradient)
    return LossSum(total, count_labels(labels))


def exit_features(model: EarlyExitModel, layer: int, state: State) -> Tensor:
    """What goes into the head of the exit after `layer`: (B, T, H), with its graph."""
    features = _compiled(_features) if model.chain.compiled else _features
    return features(model.exit(layer), state)


def _features(exit: Exit, state: State) -> Tensor:
    return exit.features(state)


def _loss(
    exit: Exit, features: Tensor, labels: Tensor, teacher: Tensor | None, objective: Objective
) -> Tensor:
    return exit.output.loss(features, labels, teacher, objective)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` compiled; all exits of an architecture share its graph."""
    return torch.compile(function, dynamic=False)


def _teacher(model: EarlyExitModel, final: Tensor) -> Callable[[int, int], Tensor]:
    """The final exit's logits at the positions start..stop-1 of `final` (B, T, H), without a graph.

    Of the tokens that the exits know, if their vocabulary is reduced. The last ones are kept:
    where all tokens are one chunk, every exit asks for the same.
    """

    known = model.exit(model.exit_layers[0]).output.tokens

    @lru_cache(maxsize=1)
    @torch.no_grad()
    def teacher(start: int, stop: int) -> Tensor:
        logits = model.backbone.final_logits(final[:, start:stop])
        return logits if known is None else logits.index_select(-1, known)

    return teacher


def _chunks(labels: Tensor, vocabulary: int) -> Iterator[slice]:
    """The positions of labels (B, T) in runs whose logits here are at most about `LOGITS` values.

    A run ends with the first position of the next: the losses of a run are those of all its
    positions but the last, which has nothing after it there.
    """
    batch, length = labels.shape
    size = max(1, LOGITS // (batch * vocabulary))
    for start in range(0, max(1, length - 1), size):
        yield slice(start, start + size + 1)


def _backward(value: Tensor, gradient: Tensor | None = None) -> None:
    """Back-propagate outside of autocast, which is meant for the forward pass alone."""
    with torch.autocast(value.device.type, enabled=False):
        value.backward(gradient)


def exit_gradients(
    model: EarlyExitModel,
    micro_batches: list[Batch],
    objective: Objective,
    weights: dict[int, float],
    autocast: torch.dtype | None = None,
    pipeline: Pipeline = ONE_PROCESS,
) -> Iterator[tuple[int, Tensor]]:
    """(exit layer, mean loss), each once the exit has its gradients of all `micro_batches`.

    Lazy: whoever asks for the next exit may have used this one's gradients and freed them. Losses
    are sums, divided by the labelled tokens of the whole global batch, so micro-batches with
    unequal numbers of them count by their tokens. weights: loss weight per exit layer. With
    several data-parallel ranks, loss and gradients are this rank's terms of the sum.
    """
    device = model.backbone.device
    micro_batches = [_for_exits(model, batch) for batch in micro_batches]
    count = torch.stack([count_labels(batch["labels"]) for batch in micro_batches]).sum()
    count = pipeline.mesh.sum_over("dp", to_device(count, device)).clamp(min=1)
    scales = {layer: weights[layer] / count for layer in model.exit_layers}
    means = {layer: torch.zeros((), device=device) for layer in model.exit_layers}
    cast = partial(torch.autocast, device.type, autocast, enabled=autocast is not None)
    runs_together = waves(model, micro_batches, objective)
    pipeline.settle()
    for wave in runs_together:
        batches = [place_batch(model, batch) for batch in wave]
        with cast():
            runs = [exit_losses(model, batch, objective, scales, pipeline) for batch in batches]
        for layer in model.exit_layers:
            with cast(), working_copies(model.exit(layer), autocast) as gradients:
                for run in runs:
                    with pipeline.timeline.record("exit work"):
                        means[layer] += next(run)[1].total / count
                        gradients.add_pairs(fused=model.chain.compiled)
            if wave is runs_together[-1]:
                yield layer, means[layer]


def waves(
    model: EarlyExitModel, micro_batches: list[Batch], objective: Objective
) -> list[list[Batch]]:
    """The micro-batches that go down the layers side by side.

    As `ee_tuning.costs.runs_side_by_side` has it. Sharded exits are gathered, and their gradients
    summed, only once; of a sharded backbone all ranks run the same layers at a time.
    """
    sharded = any(isinstance(p, ShardedParameter) for p in model.exits.parameters())
    if sharded or model.chain.shards:
        return [micro_batches]
    sizes = [sum(p.nbytes for p in model.exit(k).parameters()) for k in model.exit_layers]
    tokens = sum(batch["input_ids"].numel() for batch in micro_batches)
    tokens //= model.chain.part.size if model.chain.part else 1
    state = model.backbone.config.hidden_size * model.backbone.dtype.itemsize
    states = state_bytes(tokens, state, len(sizes), objective.needs_teacher)
    if runs_side_by_side(states, sizes):
        return [micro_batches]
    return [[batch] for batch in micro_batches]


def _for_exits(model: EarlyExitModel, batch: Batch) -> Batch:
    """A micro-batch with its labels as the exits count them, if their vocabulary is reduced."""
    if model.vocabulary is None:
        return batch
    return batch | {"labels": model.vocabulary.to_places(batch["labels"])}


def place_batch(model: EarlyExitModel, batch: Batch) -> Batch:
    """A micro-batch from the host on the model's device, with what its attention wants."""
    if model.chain.takes_boundaries:
        batch = batch | {"boundaries": boundaries(batch["position_ids"])}
    return {name: to_device(values, model.backbone.device) for name, values in batch.items()}


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy of host `values` on `device` that the host does not wait for."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def tuning_step(
    model: EarlyExitModel,
    optimizers: Optimizers,
    micro_batches: list[Batch],
    objective: Objective,
    weights: dict[int, float],
    clip: float,
    autocast: torch.dtype | None = None,
    pipeline: Pipeline = ONE_PROCESS,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """One optimizer step of every exit; gives mean losses and gradient norms, on the device.

    An exit is stepped, and its gradients are freed, before a deeper one is computed; with several
    data-parallel ranks only after, so that summing its gradients takes no time. Losses are this
    rank's terms of the sum over them.
    """
    losses: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}
    summed: deque[tuple[int, GradientSum]] = deque()
    at_once = 1 if pipeline.mesh.dp > 1 else 0

    def step_exits(left: int) -> None:
        while len(summed) > left:
            layer, gradients = summed.popleft()
            with pipeline.timeline.record("waiting"):
                gradients.wait()
            with pipeline.timeline.record("exit work"):
                norms[layer] = clip_gradients(model.exit(layer), clip).to(losses[layer].device)
                optimizers[layer].step()
                optimizers[layer].zero_grad(set_to_none=True)

    given = micro_batches, objective, weights, autocast, pipeline
    for layer, loss in exit_gradients(model, *given):
        losses[layer] = loss
        summed.append((layer, GradientSum(model.exit(layer), pipeline.mesh)))
        step_exits(at_once)
    step_exits(0)
    return losses, norms


@torch.no_grad()
def mean_losses(
    model: EarlyExitModel,
    batches: Iterable[Batch],
    autocast: torch.dtype | None = None,
    pipeline: Pipeline = ONE_PROCESS,
) -> dict[int, float]:
    """Mean cross-entropy per exit over `batches`, in nats per token.

    Of all exits and over the batches of all ranks, whose sums and counts are added up once.
    """
    device, mesh = model.backbone.device, pipeline.mesh
    totals = {layer: torch.zeros((), device=device) for layer in model.all_exit_layers}
    count = torch.zeros((), device=device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        for cpu_batch in batches:
            batch = place_batch(model, _for_exits(model, cpu_batch))
            count += count_labels(batch["labels"])
            losses = exit_losses(model, batch, Objective(), pipeline=pipeline)
            for layer in model.exit_layers:
                with working_copies(model.exit(layer), autocast):
                    totals[layer] += next(losses)[1].total
    pipeline.settle()
    values = torch.stack([*totals.values(), count * (mesh.pp_rank == 0)]).double().tolist()
    *sums, tokens = mesh.sum_on_host(values if mesh.tp_rank == 0 else [0.0] * len(values))
    return {layer: total / max(1.0, tokens) for layer, total in zip(totals, sums, strict=True)}
