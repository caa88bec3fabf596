"""Pipeline parallelism: how hidden states come and go; `ee_tuning.stages` has who runs what.

Activations go forward only. A stage sends a micro-batch on as soon as it has run its layers, and
back-propagates its own exits while the next stage runs its own.
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

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.overlap = 1 if mesh.dp > 1 else 0
        self.timeline = Timeline()
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def record(self, what: str) -> AbstractContextManager[None]:
        """See `Timeline.record`."""
        return self.timeline.record(what)

    def enter(self, model: Network, batch: Batch) -> Descent:
        """A micro-batch before this stage's layers; with several stages, behind them and handed
        on, so that the next stage can begin."""
        ids, rest = batch["input_ids"], (batch["position_ids"], batch.get("boundaries"))
        inputs = ids if self.mesh.pp_rank == 0 else self._receive(model, ids)
        descent = model.chain.descend(inputs, *rest, around=self.record)
        if self.mesh.pp > 1:
            hidden = descent.ahead(model.chain.stop)
            if self.mesh.pp_rank < self.mesh.pp - 1:
                self._send(hidden)
        return descent

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

    def _receive(self, model: Network, ids: Tensor) -> Tensor:
        """The hidden states (B, T, H) of token ids (B, T) after the stage before.

        Or this process's part of them, which the same one there has.
        """
        batch, length = ids.shape
        parts = model.chain.part.size if model.chain.part else 1
        size = (batch, length // parts, model.backbone.config.hidden_size)
        hidden = torch.empty(size, dtype=model.backbone.dtype, device=ids.device)
        with self.record("waiting"):
            dist.recv(hidden, src=self.mesh.previous_stage)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        hidden = hidden.contiguous()
        work = dist.isend(hidden, dst=self.mesh.next_stage)
        assert work is not None
        self._sent.append((work, hidden))
