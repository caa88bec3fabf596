"""Attention of whole texts that stand side by side in a pass, each as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_texts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    window: int,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """(1, T, heads, D) of texts of so many tokens in turn, of which no slot has any yet, 0 for
    what follows them.

    query: (1, heads, T, E). key, value: (1, K/V heads, T, E or D). A call for each text: its sums
    depend on its length alone. The rest as for `ee_tuning.invariant.attention.attend`.
    """
    y = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
    stop = 0
    for length in lengths:
        start, stop = stop, stop + length
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        if softcap is None and s_aux is None:
            mask = None if length <= window else seen(length, window)
            found = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        else:
            found = _with_caps(q, k, v, window, scale, softcap, s_aux)
        y[:, start:stop] = found.transpose(1, 2)
    return y


def seen(length: int, window: int) -> Tensor:
    """Which tokens of a text (K) each of its tokens (T) sees: (T, K) bool."""
    places = torch.arange(length)
    age = places[:, None] - places
    return (age >= 0) & (age < window)


def _with_caps(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float,
    cap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Of one text: (1, heads, T, D)."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key[:, :, None].transpose(3, 4)).float() * scale
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    length = query.shape[2]
    scores = scores.masked_fill(~seen(length, window), -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, *grouped.shape[1:3], 1, 1).expand(-1, -1, -1, length, -1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., :length].to(value.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2)
