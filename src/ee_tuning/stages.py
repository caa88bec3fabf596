"""Which layers each stage of a pipeline has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from ee_tuning.errors import UserError


def cut_stages(costs: Sequence[float], stages: int, numbers: Sequence[int] = ()) -> list[range]:
    """The layers of each stage of tuning, counted from 0, up to the deepest exit.

    costs: of each layer with the exit after it. numbers: of layers per stage; default: balanced.

    Raises:
        UserError: more stages than layers, or numbers that do not fit.
    """
    if stages > len(costs):
        raise UserError(
            f"pp is {stages}: there are only {len(costs)} layers up to the deepest exit"
        )
    return cut_layers(costs, stages, numbers, "the deepest exit's layer")


def cut_layers(
    costs: Sequence[float], stages: int, numbers: Sequence[int], what: str
) -> list[range]:
    """Layers of the given costs as `stages` runs, of so many layers each, or else balanced.

    Raises:
        UserError: `numbers` do not fit; what: that the number of layers is.
    """
    numbers = numbers or balance(costs, stages)
    if len(numbers) != stages or sum(numbers) != len(costs) or min(numbers) < 1:
        raise UserError(
            f"stage_layers {list(numbers)} does not fit: give {stages} numbers of layers, each at "
            f"least 1, that add up to {len(costs)}, {what}"
        )
    stops = list(accumulate(numbers))
    return [range(stop - number, stop) for stop, number in zip(stops, numbers, strict=True)]


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Numbers of consecutive layers, one per stage, whose dearest stage is as cheap as can be.

    By dynamic programming over (layers left, stages left), O(layers² · stages).
    """
    sums = [0.0, *accumulate(costs)]

    @cache
    def best(start: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """The dearest stage's cost and the stops of layers `start`… in `stages` runs."""
        if stages == 1:
            return sums[-1] - sums[start], (len(costs),)
        options = []
        for stop in range(start + 1, len(costs) - stages + 2):
            rest, stops = best(stop, stages - 1)
            options.append((max(sums[stop] - sums[start], rest), (stop, *stops)))
        return min(options)

    stops = best(0, stages)[1]
    return [stop - start for start, stop in zip((0, *stops), stops, strict=False)]
