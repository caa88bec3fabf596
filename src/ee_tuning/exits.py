"""The four exit architectures (method of arXiv 2402.00518, section 2) and their initialisation.

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
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ee_tuning.backbone import Backbone, Segment, State, attention_name, in_memory, mlp_names
from ee_tuning.config import ExitSpec
from ee_tuning.errors import UserError
from ee_tuning.losses import SOFTMAX, Softmax
from ee_tuning.quantise.fp8 import Fp8Linear
from ee_tuning.slices import SplitParameter, part
from ee_tuning.twin import twin
from ee_tuning.vocabulary import select_rows

# What the families call the matrix with which an MLP or an attention writes to the residual.
WRITES_BACK = {"o_proj", "out_proj", "down_proj", "c_proj", "fc2", "dense", "dense_4h_to_h"}


class _Replay(nn.Module):
    """In place of an attention: gives again what the layer's own attention gave."""

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class Exit(nn.Module):
    """One exit: turns the `State` at its layer into logits.

    Trainable submodules, by architecture: ``head`` (if own), ``norm``, ``mlp`` (a ModuleDict,
    usually of one MLP), ``block``.
    """

    def __init__(self, backbone: Backbone, spec: ExitSpec) -> None:
        """Copies the backbone's own modules.

        Raises:
            UserError: an `mlp` exit on a mixture of experts, or a `layer` exit while the
                backbone's last layer is not in memory.
        """
        super().__init__()
        self.spec = spec
        self.softmax: Softmax = SOFTMAX  # over its logits, which may be parts of the vocabulary's
        self.sequence: Any = None  # see `ee_tuning.parallel.sequence.SequencePart`
        if spec.head == "own":
            self.head = _trainable(backbone.head)
        if spec.arch != "embedding":
            self.norm = _trainable(backbone.norm)
        # What is shared with the backbone is kept out of the module tree by these dicts.
        self._frozen: dict[str, Any] = {"init_weights": backbone.model._init_weights}
        self._frozen["plain_head"] = None  # see `prepare`
        self._frozen["vocab_size"] = backbone.config.vocab_size
        self.tokens: Tensor | None
        self.register_buffer("tokens", None, persistent=False)
        if spec.arch == "mlp":
            layer = backbone.layers[spec.layer - 1]
            names = mlp_names(layer)
            self.mlp = nn.ModuleDict(
                {name: _trainable(layer.get_submodule(name)) for name in names}
            )
            replay = _Replay()
            parts: dict[str, nn.Module] = {attention_name(layer): replay, **self.mlp}
            self._frozen |= {"replay": replay, "layer": twin(layer, parts)}
        if spec.arch == "layer":
            self.block = _trainable(backbone.layers[-1])
            self._frozen["segment"] = backbone.block(self.block)
        self._frozen["output"] = backbone.output(self.head if spec.head == "own" else backbone.head)

    @property
    def segment(self) -> Segment | None:
        """The block of a `layer` exit as a segment; None for the others."""
        return self._frozen.get("segment")

    @property
    def plain_head(self) -> Fp8Linear | None:
        """The backbone's head in fp8, where its products are all there is to the logits."""
        return self._frozen["plain_head"]

    def features(self, state: State, cache: Cache | None = None) -> Tensor:
        """What goes into the head: (B, T, H). `cache` is for the block of a `layer` exit."""
        hidden = state.hidden
        if self.spec.arch == "mlp":
            hidden = self._replace_mlp(state)
        if self.spec.arch == "layer":
            assert self.segment is not None
            hidden = self.segment(hidden, state.position_ids, cache, state.boundaries).hidden
        hidden = hidden if self.spec.arch == "embedding" else self.norm(hidden)
        return hidden if self.sequence is None else self.sequence.gather(hidden, terms=True)

    def reduce_vocabulary(self, backbone: Backbone, tokens: Tensor) -> None:
        """Keep only the rows `tokens` (N,) of the head; the backbone's own stays as it is."""
        own = self.spec.head == "own"
        head = select_rows(self.head if own else backbone.head, tokens)
        self.add_module("head" if own else "reduced", head)
        self._frozen["output"] = backbone.output(head)
        self.register_buffer("tokens", tokens, persistent=False)

    def logits(self, features: Tensor) -> Tensor:
        """(B, T, H) → (B, T, V); −∞ for tokens that are not in a reduced vocabulary."""
        known = self.known_logits(features)
        if self.tokens is None:
            return known
        size = (*known.shape[:-1], self._frozen["vocab_size"])
        return known.new_full(size, -math.inf).index_copy(-1, self.tokens, known)

    def known_logits(self, features: Tensor) -> Tensor:
        """(B, T, H) → (B, T, N), of the tokens that the exit knows; N is V unless reduced.

        Through the backbone's own scaling and soft-capping.
        """
        return self._frozen["output"](inputs_embeds=features).logits

    def forward(self, state: State, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) at this exit."""
        return self.logits(self.features(state, cache))

    def _replace_mlp(self, state: State) -> Tensor:
        """The exit layer's own forward with M for its MLP; its attention is not run again."""
        assert state.call is not None, "the segment before an mlp exit must record its last call"
        replay = self._frozen["replay"]
        replay.output = state.call.attention
        output = self._frozen["layer"](*state.call.args, **state.call.kwargs)
        replay.output = None  # not kept alive until the next call
        return output[0] if isinstance(output, tuple) else output

    def reset_random(self, seed: int) -> None:
        """Random initialisation, reproducible from (seed, exit layer).

        Normal with std 0.02 for the head, MLP inputs and q/k/v; 0.02/√(2k) for what an MLP or
        attention writes back; norms as transformers starts them (a factor of 1); biases 0.
        """
        generator = torch.Generator().manual_seed(seed * 100_003 + self.spec.layer)
        small = 0.02 / math.sqrt(2 * self.spec.layer)
        for path, module in self.named_modules():
            if "norm" in type(module).__name__.lower():
                self._frozen["init_weights"](module)
                continue
            for name, p in module.named_parameters(recurse=False):
                std = small if WRITES_BACK & {*path.split("."), name} else 0.02
                shape = p.whole_shape if isinstance(p, SplitParameter) else p.shape
                values = torch.empty(shape).normal_(0, std, generator=generator)
                with torch.no_grad():
                    p.copy_(part(p, values if p.dim() >= 2 else torch.zeros(shape)))


def _trainable(module: nn.Module) -> nn.Module:
    """A copy of `module` that can be tuned.

    Raises:
        UserError: the module was left out of memory.
    """
    if not in_memory(module):
        raise UserError("the module to copy an exit from is not in memory: load the whole backbone")
    return copy.deepcopy(module).requires_grad_(True)
