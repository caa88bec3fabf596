"""Flash attention over packed documents, on CUDA: no mask, each document attends to itself.

transformers hands a 4-D "mask" through to the attention function as it is. Here that tensor may
hold, instead of a mask, the documents' boundaries, so any family that uses transformers' attention
interface gets variable-length attention without a line of its own, and without the host having to
look at the positions. Where every row is one document there are no boundaries inside, and attention
is dense, for which cuDNN's kernel comes first. With anything else for a mask, attention is
transformers' `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ee_tuning import attention

NAME = "ee_tuning_varlen"


def boundaries(position_ids: Tensor) -> Tensor:
    """Where documents begin in positions (B, T) on the CPU, and the end: (1, 1, 1, N) int32.

    A document begins where positions do not go on by one; counted over all rows laid end to end.
    Padded with the end to a power of two of at least 64, so that few shapes are ever seen; none at
    all, (1, 1, 1, 0), where every row is one document.
    """
    rows, length = position_ids.shape
    if torch.equal(position_ids, torch.arange(length).expand(rows, length)):
        return torch.empty(1, 1, 1, 0, dtype=torch.int32)
    flat = position_ids.flatten()
    starts = torch.ones_like(flat, dtype=torch.bool)
    starts[1:] = flat[1:] != flat[:-1] + 1
    starts[::length] = True
    found = starts.nonzero().flatten()
    padded = torch.full((max(64, 1 << len(found).bit_length()),), len(flat), dtype=torch.int32)
    padded[: len(found)] = found.int()
    return padded.view(1, 1, 1, -1)


def can_use(model: PreTrainedModel) -> bool:
    """Whether `model` may attend with `attend`: on CUDA, in half precision, with plain heads."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.bfloat16, torch.float16)
        and config._attn_implementation == "sdpa"
        and bool(getattr(model, "_supports_attention_backend", False))
        and not getattr(config, "attn_logit_softcapping", None)
        and head <= 256
        and head % 8 == 0
    )


def use_varlen(model: nn.Module) -> None:
    """Let every transformers module in `model` attend with `attend`, in place."""
    attention.use(model, NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, h, T, d), key and value (B, k, T, d).

    With `boundaries` for `attention_mask`, attention within them. Gives (B, T, h, d).
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        kwargs |= {"scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, _, length, _ = query.shape
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    is_windowed = sliding_window is not None and 0 < sliding_window < length
    ends = attention_mask.flatten()
    if not len(ends):
        if not is_windowed:
            return _dense(query, key, value, scaling), None
        stop = batch * length + 1
        ends = torch.arange(0, stop, length, dtype=torch.int32, device=query.device)
    from torch.nn.attention.varlen import varlen_attn  # needs torch 2.10

    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    # A window of w tokens counts the token itself; flash attention counts those before it.
    window = (sliding_window - 1, 0) if sliding_window and is_windowed else (-1, 0)
    rows = varlen_attn(q, k, v, ends, ends, length, length, scale=scaling, window_size=window)
    assert isinstance(rows, Tensor)
    return rows.unflatten(0, (batch, length)), None


def _dense(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention within whole rows, by the first of these kernels that can: (B, T, h, d).

    cuDNN's takes about half of flash attention 2's time on Hopper. Where a gradient is needed, in
    the block of a `layer` exit, it is left out: its backward pass has not been measured here.
    """
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not query.requires_grad:
        kernels.insert(0, SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(kernels, set_priority=True):
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return y.transpose(1, 2)


attention.register(NAME, attend)
