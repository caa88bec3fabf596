"""Prompts of random tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def prompt(length: int, seed: int = 0) -> list[int]:
    """So many ids of a vocabulary of 96, none of them a special one."""
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """A batch (B, P) with its attention mask, padded on the left."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)
