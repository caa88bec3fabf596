"""The head of an exit: features to logits and losses, over all tokens or those that exits know."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ee_tuning.backbone import Backbone
from ee_tuning.collectives import Group
from ee_tuning.errors import UserError
from ee_tuning.losses import SOFTMAX, Softmax, next_tokens
from ee_tuning.quantise.fp8 import Fp8Linear, head_loss


class Head(nn.Module):
    """What follows an exit's features: its own output matrix, or the backbone's frozen one.

    shared: whether it is the backbone's. softmax: over its logits, which may be parts of the
    vocabulary's. tokens: those that it knows, (N,) int64, None for all. A head has no parameters
    and no saved tensors of its own: its matrix is the exit's or the backbone's, and the rows that a
    reduced vocabulary picks of the backbone's are a buffer that no state dict shows.
    """

    tokens: Tensor | None
    picked: nn.Linear | None

    def __init__(self, backbone: Backbone, own: nn.Module | None) -> None:
        """own: the exit's matrix; None: the backbone's is shared."""
        super().__init__()
        self.shared = own is None
        self.softmax: Softmax = SOFTMAX
        self.vocabulary = backbone.config.vocab_size
        self.register_buffer("tokens", None, persistent=False)
        self.picked = None
        # Kept out of the module tree: what is shared with the exit or the backbone.
        self._parts: dict[str, Any] = {"fused": None}
        self._use(backbone, backbone.head if own is None else own)

    def _use(self, backbone: Backbone, linear: nn.Module) -> None:
        self._parts |= {"linear": linear, "output": backbone.output(linear)}

    @property
    def linear(self) -> Any:
        """The matrix, whoever owns it."""
        return self._parts["linear"]

    @property
    def fused(self) -> Fp8Linear | None:
        """The matrix, where loss and gradient are computed in one go; see `fuse`."""
        return self._parts["fused"]

    @property
    def size(self) -> int:
        """How many tokens it knows."""
        return self.vocabulary if self.tokens is None else len(self.tokens)

    def keep(self, backbone: Backbone, tokens: Tensor) -> nn.Linear:
        """Know only `tokens` (N,) from now on; gives the matrix of their rows.

        The backbone's own stays as it is; of an exit's own the caller keeps what this gives.

        Raises:
            UserError: the head is not a linear layer.
        """
        rows = select_rows(self.linear, tokens)
        if self.shared:
            self.picked = as_buffers(rows)
        self._use(backbone, rows)
        self.register_buffer("tokens", tokens, persistent=False)
        return rows

    def twin(self, backbone: Backbone, linear: nn.Module) -> Head:
        """The same head with another matrix that has the same values."""
        own = copy.copy(self)
        own._parts = self._parts | {"output": backbone.output(linear)}
        return own

    def keep_final(self, backbone: Backbone, group: Group) -> None:
        """Of a reduced vocabulary, keep what the final exit needs for this process's tokens: see
        `final`. To be called before the backbone's head is split."""
        if self.tokens is not None:
            rows = select_rows(backbone.head, group.own(self.tokens, 0))
            self._parts["final"] = backbone.output(rows, backbone.norm)

    @property
    def final(self) -> Callable[[Tensor], Tensor] | None:
        """The final exit's logits of this process's tokens, from (B, T, H) after the last layer;
        None where no head is split, or all tokens are known."""
        output = self._parts.get("final")
        return None if output is None else lambda hidden: output(inputs_embeds=hidden).logits

    def fuse(self, backbone: Backbone, native_only: bool = True) -> None:
        """Compute loss and gradient of a shared head in fp8 in one go, where that is the same.

        That is where the model does nothing to the head's products (no scaling, no soft-capping),
        which is tried out. native_only: only where fp8 matrix units are.
        """
        linear = self.linear
        if not self.shared or self.tokens is not None or type(linear) is not Fp8Linear:
            return
        if linear.bias is not None or (native_only and not linear.native):
            return
        draw = torch.Generator().manual_seed(0)
        x = 100 * torch.randn(1, 16, linear.in_features, generator=draw)
        x = x.to(backbone.device, backbone.dtype)
        if torch.equal(backbone.logits(x), linear(x)):
            self._parts["fused"] = linear

    def logits(self, features: Tensor) -> Tensor:
        """(B, T, H) → (B, T, V); −∞ for tokens that are not in a reduced vocabulary."""
        return self.whole(self.known_logits(features))

    def whole(self, known: Tensor) -> Tensor:
        """Logits (…, N) of the tokens that it knows among those of all, (…, V)."""
        if self.tokens is None:
            return known
        size = (*known.shape[:-1], self.vocabulary)
        return known.new_full(size, -math.inf).index_copy(-1, self.tokens, known)

    def known_logits(self, features: Tensor) -> Tensor:
        """(B, T, H) → (B, T, N), of the tokens that it knows.

        Through the backbone's own scaling and soft-capping.
        """
        return self._parts["output"](inputs_embeds=features).logits

    def loss(
        self, features: Tensor, labels: Tensor, teacher: Tensor | None, objective: Any
    ) -> Tensor:
        """Summed loss of features (B, T, H) on labels (B, T), places among the known tokens.

        teacher: the final exit's logits (B, T, N), if the objective needs them.
        """
        if self.fused is not None and objective.is_plain and features.requires_grad:
            targets = next_tokens(labels).flatten()
            return head_loss(self.fused, features.flatten(0, 1), targets)
        return objective(self.known_logits(features), labels, teacher, self.softmax).total


def select_rows(head: nn.Module, tokens: Tensor) -> nn.Linear:
    """A head with the rows `tokens` (N,) of `head`, in whatever its weight is kept in.

    Raises:
        UserError: the head is not a linear layer.
    """
    if not isinstance(head, nn.Linear):
        raise UserError(f"exits on a {type(head).__name__} head cannot have a reduced vocabulary")
    selected = copy.copy(head)
    selected.out_features = len(tokens)
    selected._parameters = {
        name: None if p is None else nn.Parameter(_rows(p, tokens), p.requires_grad)
        for name, p in head._parameters.items()
    }
    selected._buffers = dict(head._buffers)
    for name, values in head._buffers.items():  # those of a head that is kept in fp8
        if values is not None:
            transposed = name == "transposed"
            rows = _rows(values.t() if transposed else values, tokens)
            selected._buffers[name] = rows.t().contiguous() if transposed else rows
    return selected


def as_buffers(linear: nn.Linear) -> nn.Linear:
    """`linear` with buffers for its parameters: it moves, and nothing tunes, counts or saves it."""
    linear._non_persistent_buffers_set = set(linear._non_persistent_buffers_set)
    for name, p in list(linear._parameters.items()):
        del linear._parameters[name]
        linear.register_buffer(name, None if p is None else p.detach(), persistent=False)
    return linear


def _rows(values: Tensor, tokens: Tensor) -> Tensor:
    """Rows of a tensor; of one in fp8, which cannot be indexed, by way of its bytes."""
    values, tokens = values.detach(), tokens.to(values.device)
    if values.dtype.itemsize == 1:
        return values.contiguous().view(torch.uint8)[tokens].view(values.dtype)
    return values[tokens]
