"""Pipeline parallelism: which layers a stage has, and how hidden states come and go.

Activations go forward only. A stage sends a micro-batch on as soon as it has run its layers, and
back-propagates its own exits while the next stage runs its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.config import TuneConfig
from ee_tuning.errors import UserError
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


def cut_stages(
    model: EarlyExitModel, config: TuneConfig, costs: Sequence[float] | None = None
) -> list[range]:
    """The layers of each stage, counted from 0, up to the deepest exit of `model`.

    model: may be on the meta device: only its shapes are looked at. costs: of each layer with the
    exit after it; default: counted.

    Raises:
        UserError: more stages than layers, or a --stage-layers that does not fit.
    """
    deepest = model.exit_layers[-1]
    if config.pp > deepest:
        raise UserError(
            f"pp is {config.pp}: there are only {deepest} layers up to the deepest exit"
        )
    costs = costs or layer_costs(model, config.seq_length)
    return cut_layers(costs, config.pp, config.stage_layers, "the deepest exit's layer")


def cut_layers(
    costs: Sequence[float], stages: int, numbers: Sequence[int], what: str
) -> list[range]:
    """Layers of the given costs as `stages` runs, of so many layers each, or else balanced.

    Raises:
        UserError: `numbers` do not fit; what: that the number of layers is.
    """
    numbers = numbers or balance(costs, stages)
    if len(numbers) != stages or sum(numbers) != len(costs) or min(numbers) < 1:
        raise UserError(
            f"stage_layers {list(numbers)} does not fit: give {stages} numbers of layers, each at "
            f"least 1, that add up to {len(costs)}, {what}"
        )
    stops = list(accumulate(numbers))
    return [range(stop - number, stop) for stop, number in zip(stops, numbers, strict=True)]


def layer_costs(model: EarlyExitModel, length: int) -> list[float]:
    """FLOP per token of each layer with the exit after it, up to the deepest exit.

    2 per weight of a product's forward, 6 with its backward, of the gradients for the weights and
    for the input 2 each; attention over `length` tokens, of which half are before a token, takes
    2·`length`·H forward. A shared head has no gradients for its weights.
    """
    backbone = model.backbone
    attention = 2.0 * length * backbone.config.hidden_size
    layers = backbone.layers[: model.exit_layers[-1]]
    costs = [2.0 * count_weights(layer) + attention for layer in layers]
    head = count_weights(backbone.head)
    for layer in model.exit_layers:
        exit = model.exit(layer)
        costs[layer - 1] += 6.0 * count_weights(exit)
        costs[layer - 1] += 4.0 * head if exit.spec.head == "shared" else 0
        costs[layer - 1] += 3 * attention if exit.spec.arch == "layer" else 0
    return costs


def count_weights(module: torch.nn.Module) -> int:
    """How many values the matrices of a module have."""
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)


def exit_weights(model: EarlyExitModel, layer: int) -> int:
    """How many values the matrices have that predict at an exit, its head's too if it is shared."""
    exit = model.exit(layer)
    head = count_weights(model.backbone.head) if exit.spec.head == "shared" else 0
    return count_weights(exit) + head


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Numbers of consecutive layers, one per stage, whose dearest stage is as cheap as can be.

    By dynamic programming over (layers left, stages left), O(layers² · stages).
    """
    sums = [0.0, *accumulate(costs)]

    @cache
    def best(start: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """The dearest stage's cost and the stops of layers `start`… in `stages` runs."""
        if stages == 1:
            return sums[-1] - sums[start], (len(costs),)
        options = []
        for stop in range(start + 1, len(costs) - stages + 2):
            rest, stops = best(stop, stages - 1)
            options.append((max(sums[stop] - sums[start], rest), (stop, *stops)))
        return min(options)

    stops = best(0, stages)[1]
    return [stop - start for start, stop in zip((0, *stops), stops, strict=False)]
