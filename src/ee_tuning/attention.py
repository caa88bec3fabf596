"""transformers' attention, with functions of this project's own in place of its."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def register(name: str, attend: Callable[..., Any]) -> None:
    """Make `attend` known to transformers by `name`, with the masks that `sdpa` has."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)


def use(model: nn.Module, name: str) -> None:
    """Let every module in `model` that attends with transformers' `sdpa` attend by `name`, in
    place."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = name
