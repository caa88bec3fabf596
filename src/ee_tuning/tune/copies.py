"""Working copies of an exit's parameters for one step, and the sums of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from ee_tuning.exits import Exit
from ee_tuning.parallel.data import ShardedParameter
from ee_tuning.slices import whole

WAITING = 2**29  # bytes of a gradient that may wait for a second one


@contextmanager
def working_copies(exit: Exit, dtype: torch.dtype | None) -> Iterator[HandedOver]:
    """Inside, the exit's matrices are whole and in the dtype they are multiplied in.

    They are cast, and gathered if they are sharded, only once. The gradients of the copies are
    added to those of the parameters, in the parameters' dtype: see `HandedOver`.
    """
    gradients = HandedOver()
    swapped = [
        (module._parameters, name, p)
        for module in exit.modules()
        for name, p in module._parameters.items()
        if p is not None and p.requires_grad and _needs_copy(p, dtype)
    ]
    for parameters, name, p in swapped:
        cast = p.detach().to(dtype if p.dim() >= 2 else p.dtype)
        gathered = whole(p, cast) if isinstance(p, ShardedParameter) else cast
        parameters[name] = torch.nn.Parameter(gathered)
        parameters[name].register_post_accumulate_grad_hook(partial(gradients.take, p))  # type: ignore[union-attr]
    try:
        yield gradients
        gradients.add_rest()
    finally:
        for parameters, name, p in swapped:
            parameters[name] = p


def _needs_copy(p: Tensor, dtype: torch.dtype | None) -> bool:
    is_cast = dtype is not None and p.dim() >= 2 and p.dtype != dtype
    return is_cast or isinstance(p, ShardedParameter)


class HandedOver:
    """Gradients of working copies on their way to the parameters.

    Adding one to a sum in fp32 reads and writes the whole sum, so two wait for each other, if they
    are not larger than `WAITING`, and are added in one pass: one after the other, in fp32.
    """

    def __init__(self) -> None:
        self._waiting: dict[Tensor, list[Tensor]] = {}

    def take(self, p: Tensor, copy: Tensor) -> None:
        """Called by autograd with the copy of `p` that has just got its gradient."""
        assert copy.grad is not None
        waiting = self._waiting.setdefault(p, [])
        waiting.append(copy.grad)
        copy.grad = None
        # In autograd's own thread: nothing is compiled here.
        if len(waiting) > 2 or waiting[0].nbytes > WAITING:
            _add(p, waiting.pop(0))

    def add_pairs(self, fused: bool) -> None:
        """Add those of which there are two. fused: compile the sum."""
        for p, waiting in self._waiting.items():
            if len(waiting) == 2:
                _add(p, *waiting, fused=fused)
                waiting.clear()

    def add_rest(self) -> None:
        """Add all that still wait."""
        for p, waiting in self._waiting.items():
            for gradient in waiting:
                _add(p, gradient)
        self._waiting.clear()


def _add(p: Tensor, *gradients: Tensor, fused: bool = False) -> None:
    """Add `gradients` to that of `p`, in its dtype, one after the other."""
    kept = "whole_grad" if isinstance(p, ShardedParameter) else "grad"
    given = [getattr(p, kept), *gradients]
    if fused and all(x is None or x.is_contiguous() for x in given):
        flat = [None if x is None else x.view(-1) for x in given]
        setattr(p, kept, _compiled_sum()(*flat, p.dtype).view(gradients[0].shape))
    else:
        setattr(p, kept, _sum(*given, dtype=p.dtype))


def _sum(total: Tensor | None, *gradients: Tensor, dtype: torch.dtype) -> Tensor:
    for gradient in gradients:
        total = gradient.to(dtype) if total is None else total.add_(gradient)
    assert total is not None
    return total


def _sum_of_two(total: Tensor | None, one: Tensor, two: Tensor, dtype: torch.dtype) -> Tensor:
    return _sum(total, one, two, dtype=dtype)


@cache
def _compiled_sum() -> Callable[..., Tensor]:
    """`_sum_of_two` in one pass, for all sizes."""
    return torch.compile(_sum_of_two, dynamic=True)
