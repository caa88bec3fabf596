"""Tensor parallelism: matrices split over the processes of the tp axis."""

from __future__ import annotations

from torch import Tensor


def whole(p: Tensor, values: Tensor) -> Tensor:
    """The whole tensor of which `values` is this process's part, split as parameter `p` is."""
    return values


def part(p: Tensor, values: Tensor) -> Tensor:
    """This process's part of `values`, split as parameter `p` is."""
    return values
