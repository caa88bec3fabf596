"""The backbone: a frozen causal LM of transformers, cut into segments.

Nothing here knows a model family, except for the few lines of `families`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ee_tuning.backbone.anatomy import Body, in_memory
from ee_tuning.backbone.segment import Passthrough, Segment
from ee_tuning.errors import UserError, first_line
from ee_tuning.twin import twin


class _Counter(nn.Module):
    """In place of a norm: counts its calls."""

    calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden


class Backbone(Body):
    """A frozen causal LM that can be cut into segments.

    Raises:
        UserError: see `ee_tuning.backbone.anatomy.find_anatomy`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.final_output = self.output(self.head)  # see `output`

    def check_cuts(self) -> None:
        """Refuse a trunk that does more to hidden states than its layers and its norm do.

        A segment without layers has to give what it is given: else a later segment would not go on
        where the one before it ended.

        Raises:
            UserError: names the family.
        """
        problem = f"a model of type {self.config.model_type} cannot be cut into segments"
        if getattr(self.config, "alibi", False):
            raise UserError(f"{problem}: with ALiBi it wants to know where a text begins")
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 2, self.config.hidden_size, generator=draw)
        hidden = hidden.to(self.device, self.dtype)
        positions = torch.arange(2, device=self.device)[None]
        segment, norm = Segment(self, [], 1, later=True, record=False), _Counter()
        segment.trunk = twin(segment.trunk, {self.anatomy.norm: norm})
        try:
            with torch.inference_mode():
                after = segment(hidden, positions).hidden
        except Exception as error:
            raise UserError(f"{problem}: {first_line(error)}") from error
        if norm.calls != 1 or not torch.equal(after, hidden):
            raise UserError(f"{problem}: it changes hidden states outside of its layers")

    def segment(
        self,
        start: int,
        stop: int,
        record: bool = False,
        change: Callable[[nn.Module], nn.Module] | None = None,
    ) -> Segment:
        """The layers `start`..`stop`-1, counted from 0. change: what to do to each.

        Raises:
            UserError: one of them was left out of memory.
        """
        layers = self.layers[start:stop]
        for number, layer in enumerate(layers, start + 1):
            if not in_memory(layer):
                raise UserError(f"layer {number} is not in memory: load the whole backbone")
        changed = layers if change is None else [change(layer) for layer in layers]
        return Segment(self, changed, start, later=start > 0, record=record)

    def block(self, layer: nn.Module) -> Segment:
        """A segment that is one layer, standing where the backbone's last layer stands."""
        return Segment(self, [layer], self.num_layers - 1, later=True, record=False)

    def embedding(self) -> Segment:
        """A segment without layers: token ids (B, T) → what the first layer is given, (B, T, H).

        With the trunk's scaling and learned positions, where it has them.
        """
        return Segment(self, [], 0, later=False, record=False)

    def output(self, head: nn.Module, norm: nn.Module | None = None) -> nn.Module:
        """The model's own way from normalised hidden states to logits, through `head`.

        Call it with ``inputs_embeds=hidden``; scalings and soft-capping are the model's. norm: for
        hidden states that are not normalised.
        """
        return twin(self.model, {self.anatomy.trunk: Passthrough(norm), self.anatomy.head: head})

    def logits(self, features: Tensor) -> Tensor:
        """The final exit's head: normalised (B, T, H) → (B, T, V)."""
        return self.final_output(inputs_embeds=features).logits

    def final_logits(self, hidden: Tensor) -> Tensor:
        """The final exit: (B, T, H) after the last layer → (B, T, V)."""
        return self.logits(self.norm(hidden))
