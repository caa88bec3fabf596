"""Pipeline parallelism: how hidden states come and go; `ee_tuning.stages` has who runs what.

A stage sends a micro-batch on as soon as it has run its layers, and back-propagates its own exits
while the next stage runs its own. No gradients are sent. With losses that compare exits with the
final one, the last stage sends what it gave back to the stages with exits, which meanwhile have
begun the next micro-batches. What a draft exit, on the last stage, reads of others goes forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.exits import Exit
from ee_tuning.model import Descent, Network
from ee_tuning.parallel.data import GradientSum
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.tensor import total_norm
from ee_tuning.parallel.trace import Timeline

Batch = dict[str, Tensor]


class Pipeline:
    """What the processes of a run do for each other: see `ee_tuning.tune.step.Transport`.

    Brings micro-batches to this stage's layers and hidden states to the next stage, and sums over
    processes.
    """

    def __init__(self, mesh: Mesh, has_exits: bool = True) -> None:
        """has_exits: whether this stage has; every process has to come here."""
        self.mesh = mesh
        self.overlap = 1 if mesh.dp > 1 else 0
        self.ahead = mesh.pp - 1 - mesh.pp_rank
        at, each = mesh.rank % (mesh.dp * mesh.tp), mesh.dp * mesh.tp
        # The processes like this one in the stages before the last, where they have exits.
        self._back = [
            rank
            for rank, has in enumerate(mesh.gather_on_host(has_exits))
            if has and rank % each == at and rank // each < mesh.pp - 1
        ]
        self.timeline = Timeline()
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def record(self, what: str) -> AbstractContextManager[None]:
        """See `Timeline.record`."""
        return self.timeline.record(what)

    @property
    def _is_last(self) -> bool:
        return self.mesh.pp_rank == self.mesh.pp - 1

    def enter(
        self, model: Network, batch: Batch, ends: bool = False, beside: bool = False
    ) -> Descent:
        """A micro-batch before this stage's layers; with several stages, behind them and handed
        on, so that the next stage can begin.

        ends: the last stage tells the others what it ends with, for `end`. beside: exits wait until
        others have entered, too; the last stage runs its layers before it waits for these.
        """
        ids, rest = batch["input_ids"], (batch["position_ids"], batch.get("boundaries"))
        if self.mesh.pp_rank == 0:
            descent = model.chain.descend(ids, *rest, around=self.record)
        else:
            descent = model.chain.descend(self._receive(model, ids), *rest, around=self.record)
            descent.ids = ids
            self._receive_sources(model, descent)
        if not self._is_last:
            self._send_on(model, descent, descent.ahead(model.chain.stop))
        elif ends and self._back:
            hidden = descent.ahead(model.backbone.num_layers)
            for rank in self._back:
                self._send(hidden, rank, self.mesh.group("pp"))
        elif beside and self.mesh.pp > 1:
            descent.ahead(model.chain.stop)
        return descent

    def end(self, model: Network, descent: Descent) -> Tensor:
        """The hidden states after the last layer; another stage is told them by the last one."""
        if self._is_last:
            return descent.ahead(model.backbone.num_layers)
        last = self.mesh.rank % (self.mesh.dp * self.mesh.tp)
        last += (self.mesh.pp - 1) * self.mesh.dp * self.mesh.tp
        return self._receive(model, descent.ids, last, self.mesh.group("pp"))

    def settle(self) -> None:
        """Wait until everything sent so far has left, and free it."""
        with self.record("waiting"):
            while self._sent:
                self._sent.popleft()[0].wait()

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over the data-parallel ranks, in place."""
        return self.mesh.sum_over("dp", values)

    def totals(self, sums: Sequence[float], tokens: float) -> tuple[list[float], float]:
        """Of all exits' summed losses, and of the tokens behind them, over all processes.

        Tensor-parallel ranks have the same losses, stages the same tokens.
        """
        own = [*sums, tokens if self.mesh.pp_rank == 0 else 0.0]
        *values, seen = self.mesh.sum_on_host(own if self.mesh.tp_rank == 0 else [0.0] * len(own))
        return values, seen

    def sum_gradients(self, exit: Exit) -> Callable[[], None]:
        """Begin to sum an exit's gradients over processes; they are whole once one has waited."""
        return GradientSum(exit, self.mesh).wait

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """The norm of the gradients of `parameters`, other processes' parts included."""
        return total_norm(parameters)

    def _receive_sources(self, model: Network, descent: Descent) -> None:
        """Of a draft exit's sources, those of the stages before."""
        start = model.chain.start
        for layer in (layer for layer in model.sources if layer <= start):
            here = layer == start
            descent.kept[layer] = descent.hidden if here else self._receive(model, descent.ids)

    def _send_on(self, model: Network, descent: Descent, hidden: Tensor) -> None:
        """To the next stage: what it begins with, and what a draft exit reads besides."""
        self._send(hidden, self.mesh.next_stage)
        stop = model.chain.stop
        for layer in (layer for layer in model.sources if layer < stop):
            self._send(descent.kept.pop(layer), self.mesh.next_stage)

    def _receive(
        self,
        model: Network,
        ids: Tensor,
        sender: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """The hidden states (B, T, H) of token ids (B, T) after the stage before.

        Or this process's part of them, which the same one there has. sender, group: default: that
        one. What goes back takes other ways than what goes forward, which would have to come first.
        """
        batch, length = ids.shape
        parts = model.chain.part.size if model.chain.part else 1
        size = (batch, length // parts, model.backbone.config.hidden_size)
        hidden = torch.empty(size, dtype=model.backbone.dtype, device=ids.device)
        with self.record("waiting"):
            source = self.mesh.previous_stage if sender is None else sender
            dist.recv(hidden, src=source, group=group)
        return hidden

    def _send(self, hidden: Tensor, to: int, group: dist.ProcessGroup | None = None) -> None:
        hidden = hidden.contiguous()
        work = dist.isend(hidden, dst=to, group=group)
        assert work is not None
        self._sent.append((work, hidden))
