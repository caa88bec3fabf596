"""Pipeline parallelism: how hidden states come and go; `ee_tuning.stages` has who runs what.

Activations go forward only. A stage sends a micro-batch on as soon as it has run its layers, and
back-propagates its own exits while the next stage runs its own.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.model import Descent, EarlyExitModel
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.trace import Timeline

Batch = dict[str, Tensor]


class Pipeline:
    """Brings micro-batches to this stage's layers and hidden states to the next stage."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.timeline = Timeline()
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def enter(self, model: EarlyExitModel, batch: Batch) -> Descent:
        """A micro-batch before this stage's layers; with several stages, behind them and handed
        on, so that the next stage can begin."""
        ids, rest = batch["input_ids"], (batch["position_ids"], batch.get("boundaries"))
        inputs = ids if self.mesh.pp_rank == 0 else self._receive(model, ids)
        descent = model.chain.descend(inputs, *rest, around=self.timeline.record)
        if self.mesh.pp > 1:
            hidden = descent.ahead(model.chain.stop)
            if self.mesh.pp_rank < self.mesh.pp - 1:
                self._send(hidden)
        return descent

    def settle(self) -> None:
        """Wait until everything sent so far has left, and free it."""
        with self.timeline.record("waiting"):
            while self._sent:
                self._sent.popleft()[0].wait()

    def _receive(self, model: EarlyExitModel, ids: Tensor) -> Tensor:
        """The hidden states (B, T, H) of token ids (B, T) after the stage before.

        Or this process's part of them, which the same one there has.
        """
        batch, length = ids.shape
        parts = model.chain.part.size if model.chain.part else 1
        size = (batch, length // parts, model.backbone.config.hidden_size)
        hidden = torch.empty(size, dtype=model.backbone.dtype, device=ids.device)
        with self.timeline.record("waiting"):
            dist.recv(hidden, src=self.mesh.previous_stage)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        hidden = hidden.contiguous()
        work = dist.isend(hidden, dst=self.mesh.next_stage)
        assert work is not None
        self._sent.append((work, hidden))
