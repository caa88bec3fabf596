"""How the compiler cuts sums on CUDA, where they must have one order for any number of tokens."""

from __future__ import annotations

from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

# Up to so many numbers a block is given two sums, and one where there is but one token: by that
# threads share a sum otherwise.
PAIRED = 2048


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


def one_order() -> Any:
    """What is compiled within cuts its sums so."""
    return V.set_choices_handler(OneOrder())
