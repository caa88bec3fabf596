"""A draft exit as EAGLE-3 has it to the letter, so that engines which read its layout run it.

    g_t = F[y¹_t-1; y²_t-1; …]  for the first draft of a chain, h_t-1 for later ones
    a_t = g_t + O·Attention([N_i(E[x_t]); N_h(g_t)])
    h_t = a_t + MLP(N_p(a_t))
    x_t+1 ~ W·N(h_t)

(arXiv 2503.01840, figure 5.) Beside `DraftExit`: the token reaches the layer by way of its
attention alone, whose q, k and v read two states side by side; F has no norms before it, and later
drafts need no map; and no token looks back at the first one of a text, since in an engine every
token brings the states of the one before it, and the first has none.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ee_tuning.backbone import Backbone, State
from ee_tuning.errors import UserError
from ee_tuning.exits.archs import trainable
from ee_tuning.exits.draft import DraftExit

# Families whose layer is the one that the layout has: pre-norm, with a gate, without biases.
LAYERS = ("llama", "mistral")


class Eagle3Exit(DraftExit):
    """Drafts as EAGLE-3 does; see the head of this file.

    It begins as the backbone's last layer, run once more on the state after the highest source at
    the token before, then on its own output: the token itself counts nothing yet.
    """

    sees_first = False

    def _make_maps(self, backbone: Backbone) -> None:
        """`first` is F; later drafts need no map.

        Raises:
            UserError: the backbone's last layer is not one that the layout has.
        """
        hidden = backbone.config.hidden_size
        kind: dict[str, Any] = {"device": backbone.device, "dtype": backbone.dtype}
        self.first = nn.Linear(len(self.sources) * hidden, hidden, bias=False, **kind)
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.weight[:, -hidden:].fill_diagonal_(1)
        self.block = _two_wide(trainable(backbone.layers[-1]), backbone)
        self._connect(backbone)
        if self.segment.windows() != [None]:
            raise UserError(
                "an eagle3 exit sees the whole text, and the backbone's last layer a sliding "
                "window of it: use --arch draft"
            )

    def splits(self, plan: dict[str, str]) -> dict[str, str]:
        """As the layer's, but that what writes is one step further in, see `_Behind`."""
        path = {"self_attn.o_proj": "self_attn.o_proj.o_proj"}
        return {
            f"mlp.{name}" if name.startswith("mlp.") else path.get(name, name): style
            for name, style in plan.items()
        }

    def _joined_first(self, ids: Tensor, states: Tensor, position_ids: Tensor) -> Tensor:
        return self._joined_later(ids, self.first(states), position_ids)

    def _joined_later(self, ids: Tensor, h: Tensor, position_ids: Tensor) -> Tensor:
        return torch.cat([self._embedded(ids, position_ids), h], dim=-1)

    def _run(
        self, joined: Tensor, position_ids: Tensor, cache: Cache | None, boundaries: Any
    ) -> Tensor:
        return super()._run(joined, position_ids, cache, boundaries).chunk(2, dim=-1)[1]

    def hidden(self, state: State, cache: Cache | None) -> Tensor:
        """The first draft's output at every token."""
        return self._unrolled(state, 1)[0]


def _two_wide(layer: nn.Module, backbone: Backbone) -> nn.Module:
    """A layer as it is, but for a token's embedding and a state side by side, (B, T, 2·H).

    q, k and v read both, each with a norm of its own; what is written, and what the MLP reads, is
    the state alone.

    Raises:
        UserError: its layers are made otherwise.
    """
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    biases = [linear for linear in linears if linear.bias is not None]
    if backbone.config.model_type not in LAYERS or biases or not linears:
        raise UserError(
            f"an eagle3 exit is a layer of Llama's, without biases, and the backbone's are of type "
            f"{backbone.config.model_type}: use --arch draft"
        )
    block: Any = layer
    attention = block.self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, _beside(getattr(attention, name)))
    attention.o_proj = _Behind("o_proj", attention.o_proj)
    block.input_layernorm = _Both(trainable(backbone.norm), block.input_layernorm)
    backbone.model._init_weights(block.input_layernorm.token)
    block.post_attention_layernorm = _OfState(block.post_attention_layernorm)
    block.mlp = _Behind("mlp", block.mlp)
    return layer


def _beside(linear: Any) -> nn.Linear:
    """A map of two states side by side that is `linear` of the second, and leaves the first.

    Of a layer split by rows, this process's part.
    """
    wide, weight = copy.deepcopy(linear), linear.weight.detach()
    wide.in_features *= 2
    wide.weight.data = torch.cat([torch.zeros_like(weight), weight], dim=1)
    return wide


class _Both(nn.Module):
    """A norm for each half of (…, 2·H): the token's, and the state's."""

    def __init__(self, token: nn.Module, state: nn.Module) -> None:
        super().__init__()
        self.token, self.state = token, state

    def forward(self, x: Tensor) -> Tensor:
        token, state = x.chunk(2, dim=-1)
        return torch.cat([self.token(token), self.state(state)], dim=-1)


class _OfState(nn.Module):
    """A norm of the second half of (…, 2·H)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.chunk(2, dim=-1)[1])


class _Behind(nn.Module):
    """What one module gives, (…, H), behind as many zeros: it is added to the state alone."""

    def __init__(self, name: str, module: nn.Module) -> None:
        """name: of the module in this one, by which it is known what it does."""
        super().__init__()
        self._name = name
        self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        y = self.get_submodule(self._name)(x)
        return F.pad(y, (y.shape[-1], 0))
