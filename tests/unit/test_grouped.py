"""Attention in which heads that share keys and values are the queries of one head."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ee_tuning.grouped import attend


class Module(torch.nn.Module):
    """What transformers' function asks of an attention."""

    is_causal = True
    num_key_value_groups = 3


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_it_gives_what_transformers_gives(length, masked):
    draw = torch.Generator().manual_seed(1)
    shapes = (5, 9, length, 8), (5, 3, 12, 8), (5, 3, 12, 8)
    q, k, v = (torch.randn(shape, generator=draw) for shape in shapes)
    mask = None
    if masked:
        hidden = torch.arange(12) > torch.arange(length, length + 5)[:, None, None, None]
        mask = torch.zeros(5, 1, length, 12).masked_fill_(hidden, torch.finfo(q.dtype).min)
    elif length > 1:
        k, v = k[:, :, :length], v[:, :, :length]
    expected, _ = sdpa_attention_forward(Module(), q, k, v, mask, scaling=0.3)
    found, _ = attend(Module(), q, k, v, mask, scaling=0.3)
    assert found.shape == (5, length, 9, 8)
    torch.testing.assert_close(found, expected)
