"""Data parallelism: samples dealt to the ranks, gradients of the exits summed over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ee_tuning.exits import Exit
from ee_tuning.parallel.mesh import Mesh

Item = TypeVar("Item")


def deal(items: Sequence[Item], mesh: Mesh) -> list[Item]:
    """This rank's share of what the data-parallel ranks work on together, in order.

    Each item goes to one rank, so sums over the ranks do not depend on their number.
    """
    return list(items[mesh.dp_rank :: mesh.dp])


class GradientSum:
    """The sum of an exit's gradients over the data-parallel ranks, on its way.

    The gradients are whole, and may be used, after `wait`.
    """

    def __init__(self, exit: Exit, mesh: Mesh) -> None:
        """Starts at once, in place; the caller goes on with other work."""
        self.works: list[dist.Work] = []
        for p in exit.parameters():
            if p.grad is None:
                continue
            if hasattr(p, "summed"):
                mesh.sum_over("tp", p.grad)
            if mesh.dp > 1:
                self.works.append(_start(p.grad, mesh))

    def wait(self) -> None:
        """Until the sum is there; on a GPU, let later work on it wait."""
        for work in self.works:
            work.wait()


def _start(gradient: torch.Tensor, mesh: Mesh) -> dist.Work:
    work = dist.all_reduce(gradient, group=mesh.group("dp"), async_op=True)
    assert work is not None
    return work
