"""Sizes of passes that are compiled for, and passes captured as CUDA graphs, one for each size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import product
from typing import Any

import torch

VERSIONS = 256  # compiled versions that a layer may have, one per size of a pass
# Sizes that are compiled for: so many times the last one, from 1 row, 1 token and so many places.
ROWS_FACTOR = LENGTH_FACTOR = 4
REACH_FACTOR, LEAST_REACH = 2, 256
CHUNK = 64  # tokens of a prompt that are read as a window, if compiled
ALIGNED = 64  # places that there are is a multiple of this, as fast attention wants it


class Sizes:
    """How large passes are: as large as they need to be, or where they are compiled, the next one
    of a few sizes.

    longest: tokens of a window at most. places: of a slot, for padded windows, too.
    """

    def __init__(self, slots: int, capacity: int, longest: int, compile: bool) -> None:
        """capacity: tokens of a sequence. longest: those of a window that are asked for."""
        self.compile = compile
        self.windows = _sizes(longest, LENGTH_FACTOR)
        self._lengths = sorted({*self.windows, CHUNK})
        self.longest = self._lengths[-1] if compile else longest
        # Windows may be padded beyond the last token.
        self.places = -(-(capacity + self.longest) // ALIGNED) * ALIGNED
        self._rows = _sizes(slots, ROWS_FACTOR)
        self._reaches = _sizes(self.places, REACH_FACTOR, LEAST_REACH)

    def rows(self, number: int) -> int:
        """Rows of a pass for so many."""
        return self._next(number, self._rows)

    def length(self, number: int) -> int:
        """Tokens of a window for so many."""
        return self._next(number, self._lengths)

    def reach(self, number: int) -> int:
        """Places that are looked at for so many."""
        return self._next(number, self._reaches)

    def all(self, single: bool) -> Iterator[tuple[int, int, int]]:
        """Every (rows, length, reach); single: windows have one token, but those of prompts."""
        lengths = sorted({*([1] if single else self.windows), CHUNK})
        for rows, reach, length in product(self._rows, self._reaches, lengths):
            yield rows, length, reach

    def _next(self, number: int, sizes: Sequence[int]) -> int:
        return next(size for size in sizes if size >= number) if self.compile else number


def _sizes(most: int, factor: int, least: int = 1) -> list[int]:
    """`least`, `factor` times that, … up to `most`, which comes last."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= factor
    return [*sizes, most]


class Graphs:
    """Passes that have been compiled and, on CUDA, captured, by their arguments."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._kept: dict[Hashable, Callable[[], Any]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def run(self, key: Hashable, function: Callable[[], Any], tune: bool) -> Any:
        """What `function` gives, which does the same each time for a key.

        tune: take the time to look for the fastest kernels.
        """
        if key not in self._kept:
            with (
                torch._dynamo.config.patch(recompile_limit=VERSIONS),
                torch._inductor.config.patch(coordinate_descent_tuning=tune),
            ):
                self._kept[key] = self._captured(function)
        return self._kept[key]()

    def _captured(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """`function` as a CUDA graph that gives the same tensors each time; as it is elsewhere.

        It is run before: compiled code compiles then. Running a pass twice changes nothing.
        """
        function()
        if not self._on_gpu:
            return function
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do, as NCCL's, is no part of it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            found = function()

        def replay() -> Any:
            graph.replay()
            return found

        return replay
