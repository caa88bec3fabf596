"""Attention of one token of each of many texts, which reads keys and values once.

transformers repeats K and V for the heads that share them wherever a compiled layer is given a
mask: three times what there is to read for a model with three heads to a group. Here such heads are
the queries of one head. It is for data, where speed counts: how sums are rounded may depend on how
many texts are written together, which `ee_tuning.invariant` prevents elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ee_tuning import attention

NAME = "ee_tuning_grouped"


def use_grouped(model: nn.Module) -> None:
    """Let every transformers module in `model` attend with `attend`, in place."""
    attention.use(model, NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, h, T, d), key and value (B, k, K, d).

    Where T is 1 and the mask, (B, 1, 1, K), is the same for all heads, h/k of them are rows of one
    head; else attention is transformers' `sdpa`. Gives (B, T, h, d).
    """
    kept = key.shape[1]
    alike = attention_mask is not None and attention_mask.shape[1] == 1
    if query.shape[2] > 1 or query.shape[1] == kept or not alike:
        kwargs |= {"scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = query.unflatten(1, (kept, -1)).squeeze(3)
    y = F.scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
    return y.flatten(1, 2)[:, None], None


attention.register(NAME, attend)
