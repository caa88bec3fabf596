"""Attention of the tokens of a window, each as if it were alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.attention import register
from ee_tuning.invariant.products import kernels

NAME = "ee_tuning_invariant"
ALL = 1 << 30  # tokens of a window that sees all


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for a pass of decoding: (n, T, heads, D).

    query: (n, heads, T, E). key, value: those of all slots, up to where the pass looks, or what the
    layer makes of them. Which a token sees, the cache of `module` says; the mask is not asked.
    """
    place, window = module.kept.place, module.kept.window or ALL
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        slots, firsts = place.slots.tolist(), place.positions[:, 0].tolist()
        y = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        for row, (slot, first) in enumerate(zip(slots, firsts, strict=True)):
            for token in range(query.shape[2]):
                last = first + token
                seen = module.kept.seen(max(0, last - window + 1), last)
                keys, values = key[slot][:, seen], value[slot][:, seen]
                asked = query[row, :, token]
                y[row, token] = _alone(asked, keys, values, scale, softcap, s_aux)
        return y, None
    y = kernels.attend(
        query, key, value, place.slots, place.positions, place.reach, window, scale,
        softcap or 0.0, s_aux,
    )  # fmt: skip
    return y, None


def _alone(
    query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """Of one token: query (heads, E), key and value (K/V heads, L, E or D): (heads, D)."""
    grouped = query.unflatten(0, (len(key), -1))
    if cap is None and sinks is None:
        y = F.scaled_dot_product_attention(grouped[None], key[None], value[None], scale=scale)
        return y[0].flatten(0, 1)
    scores = (grouped @ key.transpose(1, 2)).float() * scale
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(*grouped.shape[:2], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[1]].to(value.dtype)
    return (weights @ value).flatten(0, 1)


register(NAME, attend)
