"""What is asked of the compiler on CUDA: sums of one order for any number of tokens, and kernels
that begin while those before them end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch._inductor.config
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

# Up to so many numbers a block is given two sums, and one where there is but one token: by that
# threads share a sum otherwise.
PAIRED = 2048
# Of the compiler: a kernel comes onto the multiprocessors while the one before it ends.
EARLY, ACCESS = "triton.enable_pdl", "_handle_pdl_before_access"


class OneOrder(InductorChoices):
    """A block has the whole of one sum, where it would have two of them.

    So norms of bf16 add up alike, whether they are of one token or more, at widths of 1,025 to
    `PAIRED`; beyond these, and below, a block has one anyway.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Whether a block has the whole of a sum (``SIMDKernelFeatures``)."""
        usual = InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)
        side_by_side = features.get_reduction_hint() == ReductionHint.INNER
        known = V.graph.sizevars.statically_known_leq
        return usual or (side_by_side and known(features.reduction_numel, PAIRED))


def _wait_first(kernel: Any, lines: Any, *names: str, consider_reads: bool = False) -> None:
    """Let a kernel wait for those before it, ahead of whatever it reads or writes: the compiler
    would only where that is of the one step before, which need not be a kernel, nor have waited."""
    if kernel._enable_pdl_codegen():
        looped = kernel.inside_reduction and kernel.range_trees[-1].is_loop
        (kernel.body if looped else lines).writeline(kernel.GDC_WAIT)


@contextmanager
def compiled_kernels() -> Iterator[None]:
    """What is compiled within cuts sums in one order and, where that can be, begins early."""
    early = EARLY in torch._inductor.config.get_config_copy() and hasattr(TritonKernel, ACCESS)
    with (
        V.set_choices_handler(OneOrder()),
        torch._inductor.config.patch({EARLY: True} if early else {}),
        patch.object(TritonKernel, ACCESS, _wait_first, create=True),
    ):
        yield
