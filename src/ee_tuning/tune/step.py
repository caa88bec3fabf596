"""One tuning step: the backbone without gradients, exit by exit loss, gradients and optimizer.

`Tuner.step` is the page to read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ee_tuning.backbone import State
from ee_tuning.costs import room, state_bytes
from ee_tuning.exits import Exit, Head
from ee_tuning.losses import LossSum, Objective, Teacher, chunks, count_labels
from ee_tuning.model import Descent, Network
from ee_tuning.parallel.data import ShardedParameter
from ee_tuning.tune.optimizers import (
    Optimizers,
    clip_gradients,
    gradient_norm,
    working_copies,
)
from ee_tuning.varlen import boundaries

Batch = dict[str, Tensor]
Wait = Callable[[], None]


class Transport(Protocol):
    """What the processes of a run do for each other: see `ee_tuning.parallel.pipeline.Pipeline`.

    overlap: so many exits' gradients may be on their way while the next exit is at work. ahead: so
    many micro-batches go down this process's layers before the end of the first comes back.
    """

    overlap: int
    ahead: int

    def record(self, what: str) -> AbstractContextManager[None]:
        """Inside, this process does "forward", "exit work" or "waiting"."""

    def enter(
        self, model: Network, batch: Batch, ends: bool = False, beside: bool = False
    ) -> Descent:
        """A micro-batch on its way down this process's layers. ends: see `end`. beside: others
        enter before exits are asked."""

    def end(self, model: Network, descent: Descent) -> Tensor:
        """The hidden states after the last layer, of a micro-batch that entered with `ends`.

        Micro-batches in the order in which they entered.
        """

    def settle(self) -> None:
        """Wait until all that was sent has left."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over the data-parallel ranks, in place."""

    def totals(self, sums: Sequence[float], tokens: float) -> tuple[list[float], float]:
        """Of all exits' summed losses, and of the tokens behind them, over all processes."""

    def sum_gradients(self, exit: Exit) -> Wait:
        """Begin to sum an exit's gradients over processes; they are whole once one has waited."""

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """The norm of the gradients of `parameters`, other processes' parts included."""


class Alone:
    """The transport of a single process: nothing is sent, nothing waited for."""

    overlap = ahead = 0

    def record(self, what: str) -> AbstractContextManager[None]:
        """Nothing is recorded."""
        return nullcontext()

    def enter(
        self, model: Network, batch: Batch, ends: bool = False, beside: bool = False
    ) -> Descent:
        """A micro-batch before the first layer."""
        ids, positions = batch["input_ids"], batch["position_ids"]
        return model.chain.descend(ids, positions, batch.get("boundaries"))

    def end(self, model: Network, descent: Descent) -> Tensor:
        """The hidden states after the last layer."""
        return descent.ahead(model.backbone.num_layers)

    def settle(self) -> None:
        """Nothing was sent."""

    def total(self, values: Tensor) -> Tensor:
        """`values`."""
        return values

    def totals(self, sums: Sequence[float], tokens: float) -> tuple[list[float], float]:
        """What they are."""
        return list(sums), tokens

    def sum_gradients(self, exit: Exit) -> Wait:
        """Gradients are whole as they are."""
        return lambda: None

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """The norm of the gradients of `parameters`."""
        return gradient_norm(parameters)


@dataclass(frozen=True)
class Step:
    """What a step gives, by exit layer, on the device.

    losses: mean losses, of several data-parallel ranks this one's terms of their sum; norms: of the
    gradients, before they were clipped.
    """

    losses: dict[int, Tensor]
    norms: dict[int, Tensor]


@dataclass
class _Entered:
    """A micro-batch on its way down. labels: (B, T), as the exits count tokens."""

    labels: Tensor
    descent: Descent
    teacher: Teacher | None = None


class Tuner:
    """Tunes the exits of a model that is prepared for it: see `ee_tuning.tune.setup`."""

    def __init__(
        self,
        model: Network,
        optimizers: Optimizers,
        objective: Objective | None = None,
        *,
        clip: float = 0.0,
        autocast: torch.dtype | None = None,
        transport: Transport | None = None,
    ) -> None:
        """optimizers: of the exits that a step changes; what others get as gradients stays.

        clip: largest gradient norm of an exit; 0: any. autocast: the dtype of the products, if it
        is not the exits' own.
        """
        self.model, self.optimizers, self.clip = model, optimizers, clip
        self.objective = objective or Objective()
        self.autocast = autocast
        self.transport: Transport = transport or Alone()
        self.device = model.backbone.device
        self.together = tokens_together(model, self.objective)

    def step(self, batches: Sequence[Batch], weights: Mapping[int, float]) -> Step:
        """One optimizer step of every exit on `batches`, this process's micro-batches.

        Losses are sums, divided by the labelled tokens of the whole global batch, so micro-batches
        with unequal numbers of them count by their tokens. An exit is stepped, and its gradients
        are freed, before a deeper one is computed; with several data-parallel ranks only after, so
        that summing its gradients takes no time.

        batches: on the host. weights: loss weight per exit layer.
        """
        model, transport = self.model, self.transport
        batches = [self._for_exits(batch) for batch in batches]
        tokens = self._count(batches)
        losses = {layer: torch.zeros((), device=self.device) for layer in model.exit_layers}
        norms: dict[int, Tensor] = {}
        summing: deque[tuple[int, Wait]] = deque()
        waves = self.waves(batches)
        transport.settle()
        for number, entered in enumerate(self._entering(waves), 1):
            for layer in model.exit_layers:
                exit, scale = model.exit(layer), weights[layer] / tokens
                with self.cast(), working_copies(exit, self.autocast) as gradients:
                    for one in entered:
                        given = one.labels, one.teacher, scale
                        loss = self.loss(layer, one.descent.to(layer), *given)
                        losses[layer] += loss.total / tokens
                        with transport.record("exit work"):
                            gradients.add_pairs(fused=model.chain.compiled)
                if number == len(waves):
                    summing.append((layer, transport.sum_gradients(exit)))
                    self._step_exits(summing, norms, left=transport.overlap)
        self._step_exits(summing, norms, left=0)
        return Step(losses, norms)

    def _step_exits(
        self, summing: deque[tuple[int, Wait]], norms: dict[int, Tensor], left: int
    ) -> None:
        """Clip and step the exits whose gradients are being summed, but for the last `left`."""
        while len(summing) > left:
            layer, wait = summing.popleft()
            with self.transport.record("waiting"):
                wait()
            if layer in self.optimizers:
                with self.transport.record("exit work"):
                    exit, optimizer = self.model.exit(layer), self.optimizers[layer]
                    norm = clip_gradients(exit, self.clip, self.transport.norm)
                    norms[layer] = norm.to(self.device)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

    def loss(
        self,
        layer: int,
        state: State,
        labels: Tensor,
        teacher: Teacher | None = None,
        scale: Tensor | None = None,
        objective: Objective | None = None,
    ) -> LossSum:
        """One exit's loss on labels (B, T), chunk after chunk of the tokens, without a graph.

        Of a draft exit the losses of its drafts, by their shares. With a `scale`, the gradients of
        the loss times it are added to the exit's: a chunk's go through the head at once, and
        through the rest of the exit together at the end. objective: default the run's.
        """
        with self.transport.record("exit work"):
            exit, objective = self.model.exit(layer), objective or self.objective
            head = exit.output
            loss_of = _compiled(_loss) if self.model.chain.compiled else _loss
            predictions = self.predictions(layer, state)
            targets = exit.targets(labels, state)
            wants = scale is not None and predictions[0].requires_grad
            gradients = [torch.zeros_like(features) for features in predictions if wants]
            total = torch.zeros((), device=labels.device)
            for tokens in chunks(labels, head.softmax.share(head.size)):
                target = teacher.logits(tokens) if teacher else None
                for i, (own, share) in enumerate(targets):
                    chunk = predictions[i].detach()[:, tokens].requires_grad_(wants)
                    loss = share * loss_of(head, chunk, own[:, tokens], target, objective)
                    total += loss.detach()
                    if scale is not None and loss.requires_grad:  # not of one without parameters
                        _backward(scale * loss)
                    if wants:
                        assert chunk.grad is not None
                        gradients[i][:, tokens] += chunk.grad
            if wants:
                _backward(predictions, gradients)
            return LossSum(total, count_labels(labels))

    def predictions(self, layer: int, state: State) -> list[Tensor]:
        """What goes into the head of the exit after `layer`, (B, T, H) each, with its graph."""
        predictions = _compiled(_predictions) if self.model.chain.compiled else _predictions
        return predictions(self.model.exit(layer), state)

    @torch.no_grad()
    def mean_losses(self, batches: Iterable[Batch]) -> dict[int, float]:
        """Mean cross-entropy per exit over `batches`, in nats per token.

        Of all exits and over the batches of all ranks, whose sums and counts are added up once.
        """
        model, objective = self.model, Objective()
        sums = {layer: torch.zeros((), device=self.device) for layer in model.all_exit_layers}
        count = torch.zeros((), device=self.device)
        for batch in batches:
            one = self._enter(self._for_exits(batch), objective)
            count += count_labels(one.labels)
            for layer in model.exit_layers:
                with self.cast(), working_copies(model.exit(layer), self.autocast):
                    state = one.descent.to(layer)
                    sums[layer] += self.loss(layer, state, one.labels, objective=objective).total
                    del state
        self.transport.settle()
        *values, seen = torch.stack([*sums.values(), count]).double().tolist()
        values, seen = self.transport.totals(values, seen)
        return {layer: total / max(1.0, seen) for layer, total in zip(sums, values, strict=True)}

    def waves(self, batches: Sequence[Batch]) -> list[Sequence[Batch]]:
        """The micro-batches that go down the layers side by side: all, or one after another."""
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        return [batches] if tokens <= self.together else [[batch] for batch in batches]

    def place(self, batch: Batch) -> Batch:
        """A micro-batch from the host on the model's device, with what its attention wants."""
        if self.model.chain.takes_boundaries:
            batch = batch | {"boundaries": boundaries(batch["position_ids"])}
        return {name: to_device(values, self.device) for name, values in batch.items()}

    def _entering(self, waves: Sequence[Sequence[Batch]]) -> Iterator[list[_Entered]]:
        """Wave after wave, ready for the exits.

        Of those that wait for what the last stage makes of them, so many enter early that the
        stages in between have work.
        """
        taught = self.objective.needs_teacher and bool(self.model.exit_layers)
        ahead = self.transport.ahead if taught else 0
        coming: deque[list[_Entered]] = deque()
        for number, wave in enumerate(waves, 1):
            beside = len(wave) > 1
            coming.append([self._enter(batch, self.objective, beside) for batch in wave])
            while len(coming) > (ahead if number < len(waves) else 0):
                entered = coming.popleft()
                for one in entered if taught else ():
                    one.teacher = self._teacher(one.descent)
                yield entered

    def _enter(self, batch: Batch, objective: Objective, beside: bool = False) -> _Entered:
        """A micro-batch at the model's door."""
        placed = self.place(batch)
        with self.cast():
            descent = self.transport.enter(self.model, placed, objective.needs_teacher, beside)
        return _Entered(placed["labels"], descent)

    def _teacher(self, descent: Descent) -> Teacher:
        """The final exit, which is asked before the others: all layers run."""
        model = self.model
        with self.cast():
            final = self.final(descent)
        head = model.exit(model.exit_layers[0]).output
        softmax = head.softmax if self.objective.loss == "acceptance" else None
        return Teacher(model.backbone.final_logits, final, head.tokens, softmax, head.final)

    def final(self, descent: Descent) -> Tensor:
        """The whole hidden states (B, T, H) after the last layer: see `Transport.end`."""
        final, part = self.transport.end(self.model, descent), self.model.chain.part
        return part.gather(final) if part else final

    def _for_exits(self, batch: Batch) -> Batch:
        """A micro-batch with its labels as the exits count them, if their vocabulary is reduced."""
        if self.model.vocabulary is None:
            return batch
        return batch | {"labels": self.model.vocabulary.to_places(batch["labels"])}

    def _count(self, batches: Sequence[Batch]) -> Tensor:
        """The labelled tokens of the global batch, at least 1."""
        count = torch.stack([count_labels(batch["labels"]) for batch in batches]).sum()
        return self.transport.total(to_device(count, self.device)).clamp(min=1)

    def cast(self) -> torch.autocast:
        """Inside, products are in `autocast`'s dtype."""
        kind, enabled = self.device.type, self.autocast is not None
        return torch.autocast(kind, self.autocast, enabled=enabled)


def tokens_together(model: Network, objective: Objective) -> float:
    """How many tokens may go down the layers side by side, see `ee_tuning.costs.room`.

    Without end for sharded exits, which are gathered, and their gradients summed, only once; and
    for a sharded backbone, of which all ranks run the same layers at a time.
    """
    sharded = any(isinstance(p, ShardedParameter) for p in model.exits.parameters())
    if sharded or model.chain.shards:
        return float("inf")
    sizes = [sum(p.nbytes for p in model.exit(k).parameters()) for k in model.exit_layers]
    if not sizes:
        return 0.0
    state = model.backbone.config.hidden_size * model.backbone.dtype.itemsize
    parts = model.chain.part.size if model.chain.part else 1
    waits = objective.needs_teacher or model.draft is not None
    return parts * room(sizes) / state_bytes(1, state, len(sizes), waits)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy of host `values` on `device` that the host does not wait for."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def _predictions(exit: Exit, state: State) -> list[Tensor]:
    return exit.predictions(state)


def _loss(
    head: Head, features: Tensor, labels: Tensor, teacher: Tensor | None, objective: Objective
) -> Tensor:
    return head.loss(features, labels, teacher, objective)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled; all exits of an architecture share its graph."""
    return torch.compile(function, dynamic=False)


def _backward(values: Tensor | list[Tensor], gradients: list[Tensor] | None = None) -> None:
    """Back-propagate outside of autocast, which is meant for the forward pass alone."""
    device = values[0].device if isinstance(values, list) else values.device
    with torch.autocast(device.type, enabled=False):
        torch.autograd.backward(values, gradients)
