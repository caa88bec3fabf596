"""The exits of a layer (method of arXiv 2402.00518, section 2) and their initialisation.

====== architecture ======  ================ logits at exit layer k ================
``embedding``               ``W·y``
``norm``                    ``W·N(y)``
``mlp``                     ``W·N(layer k run again with its MLP replaced by M)``
``layer``                   ``W·N(Block(y))``, Block with its own attention and K/V
==========================  =========================================================

W is the head, N a norm of the exit's own, y the hidden state after layer k. An exit shares no
trainable parameter with another exit and sends no gradient into the backbone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ee_tuning.backbone import (
    WRITES_BACK,
    Backbone,
    Segment,
    State,
    attention_name,
    in_memory,
    mlp_names,
)
from ee_tuning.errors import UserError
from ee_tuning.exit_config import ExitSpec
from ee_tuning.exits.head import Head
from ee_tuning.slices import SplitParameter, part
from ee_tuning.twin import twin

Change = Callable[[nn.Module], nn.Module]  # what to do to a layer


def as_it_is(layer: nn.Module) -> nn.Module:
    """Nothing."""
    return layer


class Exit(nn.Module):
    """One exit: turns the `State` at its layer into logits.

    Trainable submodules, by architecture: ``head`` (if own), ``norm``, ``mlp`` (a ModuleDict,
    usually of one MLP), ``block``. What is shared with the backbone is kept out of the module tree.
    """

    # Whether the segment before it must record how its last layer was called.
    records_call = False
    # Its own layer as a segment, which has K/V.
    segment: Segment | None = None
    norm: nn.Module | None

    def __init__(self, backbone: Backbone, spec: ExitSpec) -> None:
        """Copies the backbone's own modules.

        Raises:
            UserError: what is copied was left out of memory.
        """
        super().__init__()
        self.spec = spec
        self.sequence: Any = None  # see `ee_tuning.parallel.sequence.SequencePart`
        if spec.head == "own":
            self.head = trainable(backbone.head)
        self.norm = None
        self.output = Head(backbone, self.head if spec.head == "own" else None)
        self._init_weights = backbone.model._init_weights

    def layer_parts(self) -> list[nn.Module]:
        """What is made as a layer of the backbone is, or a part of one."""
        return []

    def splits(self, plan: dict[str, str]) -> dict[str, str]:
        """How these are split over processes, by a plan for the backbone's layers."""
        return plan

    def twin(
        self, backbone: Backbone, parts: dict[str, nn.Module], head: nn.Module, change: Change
    ) -> Exit:
        """The same exit with others at the paths in `parts`, and `head` for its matrix. change:
        what to do to the layer that it runs, its own or the backbone's."""
        own = twin(self, parts)
        assert isinstance(own, Exit)
        own.output = self.output.twin(backbone, head)
        own._connect(backbone, change)
        return own

    def _connect(self, backbone: Backbone, change: Change = as_it_is) -> None:
        """Make what runs the exit's modules within the backbone's code."""

    def as_layers(self, layers: list[nn.Module]) -> list[nn.Module]:
        """The layers of an ordinary model that computes what the exit does.

        layers: the backbone's up to the exit.

        Raises:
            UserError: there is no such model.
        """
        raise NotImplementedError

    def features(self, state: State, cache: Cache | None = None) -> Tensor:
        """What goes into the head: (B, T, H). `cache` is for the block of a `layer` exit."""
        hidden = self.hidden(state, cache)
        hidden = hidden if self.norm is None else self.norm(hidden)
        return hidden if self.sequence is None else self.sequence.gather(hidden, terms=True)

    def hidden(self, state: State, cache: Cache | None) -> Tensor:
        """What goes into the exit's norm: (B, T, H)."""
        return state.hidden

    def logits(self, features: Tensor) -> Tensor:
        """(B, T, H) → (B, T, V); −∞ for tokens that the exit does not know."""
        return self.output.logits(features)

    def predictions(self, state: State) -> list[Tensor]:
        """The features that are tuned, each (B, T, H): one of a token, of a draft exit several."""
        return [self.features(state)]

    def targets(self, labels: Tensor, state: State) -> list[tuple[Tensor, float]]:
        """For each of `predictions`: its labels (B, T), and its share of the exit's loss."""
        return [(labels, 1.0)]

    def forward(self, state: State, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) at this exit."""
        return self.logits(self.features(state, cache))

    def reduce_vocabulary(self, backbone: Backbone, tokens: Tensor) -> None:
        """Know only `tokens` (N,) int64 from now on; the backbone's own head stays as it is."""
        rows = self.output.keep(backbone, tokens)
        if self.spec.head == "own":
            self.head = rows

    def reset_random(self, seed: int) -> None:
        """Random initialisation, reproducible from (seed, exit layer).

        Normal with std 0.02 for the head, MLP inputs and q/k/v; 0.02/√(2k) for what an MLP or
        attention writes back; norms as transformers starts them (a factor of 1); biases 0.
        """
        generator = torch.Generator().manual_seed(seed * 100_003 + self.spec.layer)
        small = 0.02 / math.sqrt(2 * max(1, self.spec.layer))
        for path, module in self.named_modules():
            if "norm" in type(module).__name__.lower():
                self._init_weights(module)
                continue
            for name, p in module.named_parameters(recurse=False):
                std = small if WRITES_BACK & {*path.split("."), name} else 0.02
                shape = p.whole_shape if isinstance(p, SplitParameter) else p.shape
                values = torch.empty(shape).normal_(0, std, generator=generator)
                with torch.no_grad():
                    p.copy_(part(p, values if p.dim() >= 2 else torch.zeros(shape)))


class EmbeddingExit(Exit):
    """A head alone."""

    def as_layers(self, layers: list[nn.Module]) -> list[nn.Module]:
        """Refused.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"exit {self.spec.layer} is an embedding exit: it has no final norm, which every "
            "ordinary model has; export a norm, mlp or layer exit"
        )


class NormExit(Exit):
    """A norm and a head."""

    def __init__(self, backbone: Backbone, spec: ExitSpec) -> None:
        """See `Exit`."""
        super().__init__(backbone, spec)
        self.norm = trainable(backbone.norm)

    def as_layers(self, layers: list[nn.Module]) -> list[nn.Module]:
        """The backbone's own."""
        return layers


class MlpExit(NormExit):
    """Runs the layer again with an MLP of its own, and the layer's attention as it was."""

    records_call = True

    def __init__(self, backbone: Backbone, spec: ExitSpec) -> None:
        """See `Exit`.

        Raises:
            UserError: the layer is a mixture of experts, too.
        """
        super().__init__(backbone, spec)
        layer = backbone.layers[spec.layer - 1]
        mlps = {name: trainable(layer.get_submodule(name)) for name in mlp_names(layer)}
        self.mlp = nn.ModuleDict(mlps)
        self._connect(backbone)

    def _connect(self, backbone: Backbone, change: Change = as_it_is) -> None:
        replay, layer = _Replay(), change(backbone.layers[self.spec.layer - 1])
        parts: dict[str, nn.Module] = {attention_name(layer): replay, **self.mlp}
        self._again = replay, twin(layer, parts)

    def layer_parts(self) -> list[nn.Module]:
        """The MLP."""
        return [self.mlp]

    def as_layers(self, layers: list[nn.Module]) -> list[nn.Module]:
        """The backbone's, the last with the exit's MLP."""
        return [*layers[:-1], twin(layers[-1], dict(self.mlp.items()))]

    def hidden(self, state: State, cache: Cache | None) -> Tensor:
        """The exit layer's own forward with M for its MLP; its attention is not run again."""
        assert state.call is not None, "the segment before an mlp exit must record its last call"
        replay, layer = self._again
        replay.output = state.call.attention
        output = layer(*state.call.args, **state.call.kwargs)
        replay.output = None  # not kept alive until the next call
        return output[0] if isinstance(output, tuple) else output


class LayerExit(NormExit):
    """One more layer, which starts as the backbone's last and has K/V of its own."""

    def __init__(self, backbone: Backbone, spec: ExitSpec) -> None:
        """See `Exit`."""
        super().__init__(backbone, spec)
        self.block = trainable(backbone.layers[-1])
        self._connect(backbone)

    def _connect(self, backbone: Backbone, change: Change = as_it_is) -> None:
        self.segment = backbone.block(change(self.block))

    def layer_parts(self) -> list[nn.Module]:
        """The block."""
        return [self.block]

    def as_layers(self, layers: list[nn.Module]) -> list[nn.Module]:
        """The backbone's, and the block with its K/V in the place behind them."""
        named = self.block.named_modules()
        parts = {name: twin(one, {}) for name, one in named if name and hasattr(one, "layer_idx")}
        block = twin(self.block, parts)
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = len(layers)  # type: ignore[assignment]
        return [*layers, block]

    def hidden(self, state: State, cache: Cache | None) -> Tensor:
        """The block's output."""
        assert self.segment is not None
        return self.segment(state.hidden, state.position_ids, cache, state.boundaries).hidden


class _Replay(nn.Module):
    """In place of an attention: gives again what the layer's own attention gave."""

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def trainable(module: nn.Module) -> nn.Module:
    """A copy of `module` that can be tuned.

    Raises:
        UserError: the module was left out of memory.
    """
    if not in_memory(module):
        raise UserError("the module to copy an exit from is not in memory: load the whole backbone")
    return copy.deepcopy(module).requires_grad_(True)
