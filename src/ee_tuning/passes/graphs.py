"""Sizes of passes that are compiled for, and passes captured as CUDA graphs, one for each size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from typing import Any, TypeVar

import torch
import torch._inductor.config
from torch import Tensor

from ee_tuning.passes.branches import Branches, can_branch

F = TypeVar("F", bound=Callable[..., Any])
Steps = Sequence[Callable[[], None]]  # the variants of one
# Of the compiler: how sums are cut does not depend on timings, nor on how many there are. Its
# `deterministic` would say so, but tracing sets that back behind each piece that is compiled.
SAME_SUMS = {
    name: value
    for name, value in {
        "coordinate_descent_tuning": False,
        "test_configs.force_filter_reduction_configs": True,
        "dynamic_scale_rblock": False,
        "batch_invariant": True,
    }.items()
    if name in torch._inductor.config.get_config_copy()
}
VERSIONS = 256  # compiled versions that a layer may have, one per size of a pass
# Sizes that are compiled for: so many times the last one, from 1 row, 1 token and so many places.
ROWS_FACTOR = LENGTH_FACTOR = 4
REACH_FACTOR, LEAST_REACH = 2, 256
FAR_FACTOR, LEAST_FAR = 4, 1024  # where to look too far costs next to nothing
TILE = 16  # rows that products of one order take at a time on CUDA: so many cost what 1 does
CHUNK = 64  # tokens of a prompt that are read as a window, if compiled
ALIGNED = 64  # places that there are is a multiple of this, as fast attention wants it


class Sizes:
    """How large compiled passes are: the next one of a few sizes.

    longest: tokens of a window at most. places: of a slot, for padded windows, too. apart: whether
    passes write to no slot but those that they are told of.
    """

    def __init__(
        self, slots: int, capacity: int, longest: int, compile: bool, drafts: bool = False,
        far: bool = False,
    ) -> None:  # fmt: skip
        """capacity: tokens of a sequence. longest: those of a window that are asked for. drafts: of
        a draft exit, or of texts alone, which are read at once. far: layers are those of
        `Invariant`, whose attention does not read what lies behind a text's end."""
        self._compile, self.apart = compile, far and compile and slots > 1
        # Of one text a few tokens more cost nothing; of several, half as many cost less.
        half = {-(-longest // 2)} if drafts and slots > 1 else set()
        needed = {1, min(CHUNK, longest), longest}
        self.windows = sorted(needed | half) if drafts else _sizes(longest, LENGTH_FACTOR)
        self._lengths = sorted({*self.windows, CHUNK})
        self._alone = sorted({*self._lengths} - half | needed)  # of one text
        self.longest = self._lengths[-1] if compile else longest
        # Windows may be padded beyond the last token.
        self.places = -(-(capacity + self.longest) // ALIGNED) * ALIGNED
        self._rows = _sizes(slots, TILE if far else ROWS_FACTOR)
        # Of more, the compiler cuts sums otherwise.
        few = [rows for rows in _sizes(slots, ROWS_FACTOR) if rows * CHUNK < 1024]
        self._readers = few or [1]
        factor, least = (FAR_FACTOR, LEAST_FAR) if far else (REACH_FACTOR, LEAST_REACH)
        reaches = _sizes(self.places, factor, least)
        # The last one may be a little more than `factor` times the one before it.
        self._reaches = [
            size for size in reaches if size == self.places or factor * size <= self.places
        ]

    def filled(self, slots: list[int], length: int = 1) -> list[int]:
        """`slots`, and one of them again and again, or idle ones: as many as are compiled for, for
        windows of that length; ascending.

        What is written for one again is the same; for idle slots it lies beyond what is known of
        them. That a slot is named twice, attention has to allow: that of `Invariant` does.
        """
        number, busy = _next(len(slots), self._of(length)), set(slots)
        if self.apart:
            return sorted([*slots, *slots[:1] * (number - len(slots))])
        idle = [slot for slot in range(self._rows[-1]) if slot not in busy]
        return sorted([*slots, *idle[: number - len(slots)]])

    def sized(
        self, slots: list[int], length: int, first: int
    ) -> tuple[list[int], tuple[int, int, int, bool]]:
        """The slots of a pass on windows of so many tokens, the last of which begins at `first`;
        and its rows, length, reach, and whether slots are looked at where they are."""
        length = self.length(length, len(slots))
        slots = self.filled(slots, length)
        return slots, (len(slots), length, self.reach(first + length), self.in_order(slots))

    def in_order(self, slots: list[int]) -> bool:
        """Whether the K/V of `slots` can be looked at where they are.

        Compiled, only if they are always all: each case is one more graph.
        """
        whole = not self._compile or (len(slots) == self._rows[-1] and not self.apart)
        return whole and slots == list(range(len(slots)))

    def of_prompts(self, length: int) -> bool:
        """Whether windows of that length are those of prompts alone."""
        return self._compile and length == CHUNK > self.windows[-1]

    @property
    def together(self) -> int:
        """Rows of one pass at most whose windows are as long as those of prompts."""
        return self._readers[-1]

    def _of(self, length: int) -> list[int]:
        """Numbers of rows that there are of windows of a length."""
        if self.of_prompts(length):
            return self._readers
        return self._rows if length in self._alone else self._rows[1:]

    def length(self, number: int, texts: int) -> int:
        """Tokens of windows for so many, in a pass of so many texts."""
        return _next(number, self._lengths if texts > 1 else self._alone)

    def reach(self, number: int) -> int:
        """Places that are looked at for so many."""
        return _next(number, self._reaches)

    def ends(self, length: int) -> list[int]:
        """Of one text that windows of so many tokens may follow, the longest of each reach."""
        return [reach - self.length(length, 1) for reach in self._reaches]

    def chains(self, length: int) -> Iterator[tuple[int, int]]:
        """Every window of a draft exit of so many tokens: rows, reach."""
        yield from product(self._of(length), self._reaches)

    def every(
        self,
        segments: int,
        is_first: bool,
        is_last: bool,
        drafts: bool = False,
        texts: bool = False,
    ) -> Iterator[tuple[int, int, int, int, str, bool]]:
        """Every pass: segment, rows, length, reach, after which tokens it predicts, and whether by
        the final exit.

        is_first, is_last: the first segment takes ids, the last one is the backbone's end. drafts,
        texts: of a draft exit, of texts, come before the first segment.
        """
        for i in range(segments):
            final, first = is_last and i == segments - 1, is_first and i == 0
            # Before the first segment there is one token at a time, but of prompts and drafts.
            windows = [1] if first and not (drafts or texts) else self.windows
            asked = {(n, after) for n in windows for after in ("last", "nothing")}
            if final:
                asked |= {(n, "each") for n in windows[1:]}
            if final and is_first:  # no earlier stage finds what follows
                asked -= {(n, "nothing") for n in windows}
            if final and first:
                asked -= {(n, "last") for n in windows[1:]}
            asked |= {(CHUNK, "last"), (CHUNK, "nothing")}
            for reach, (length, after) in product(self._reaches, sorted(asked)):
                for rows in self._of(length):
                    yield i, rows, length, reach, after, final and after != "nothing"


def _next(number: int, sizes: Sequence[int]) -> int:
    return next(size for size in sizes if size >= number)


def _sizes(most: int, factor: int, least: int = 1) -> list[int]:
    """`least`, `factor` times that, … up to `most`, which comes last."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= factor
    return [*sizes, most]


class Graphs:
    """Passes, and what else is done between two looks of the host, that have been compiled and, on
    CUDA, captured, by their arguments."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        # Those beside which others may run work in memory of their own.
        pools = [torch.cuda.graph_pool_handle() if self._on_gpu else None for _ in range(2)]
        self._pool, self._pool_beside = pools
        self._kept: dict[Hashable, Callable[[], Any]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    @property
    def branch(self) -> bool:
        """Whether what `branched` gives does not ask the host."""
        return self._on_gpu and can_branch()

    def run(
        self, key: Hashable, function: Callable[[], Any], tune: bool = False, beside: bool = False,
        moved: Sequence[Tensor] = (),
    ) -> Any:  # fmt: skip
        """What `function` gives, which does the same each time for a key, from where `moved` is.

        tune: take the time to look for the fastest kernels, which then add up in an order of their
        own for each key; else sums have one order for all keys. beside: others, that are not, may
        run at the same time. moved: what `function` goes on from, and moves on.
        """
        if key not in self._kept:
            kept = [one.clone() for one in moved]

            def begin() -> None:
                for one, before in zip(moved, kept, strict=True):
                    one.copy_(before)

            with _compiling(tune, self._on_gpu):
                self._kept[key] = self._captured(function, begin, beside)
            begin()
        return self._kept[key]()

    def branched(
        self, key: Hashable, steps: Callable[[], Sequence[Steps]], goes_on: Tensor,
        begin: Callable[[], Any], tune: bool, last: Callable[[], None] | None = None, ends: int = 0,
    ) -> Callable[[], None]:  # fmt: skip
        """What runs one of the variants of each of some steps, and `last` behind them in any case.

        steps: gives them, where they are not captured yet. goes_on: (1,) fp64, what the step before
        has left there: the number of a variant, from 1; else no further step runs. On CUDA the host
        is not asked. Of the first step the first variant runs; behind a variant none of a smaller
        number. begin: takes back what steps have done. tune: as for `run`. ends: the variant behind
        which no further step runs.
        """
        if key not in self._kept:
            with _compiling(tune, self._on_gpu):
                self._kept[key] = self._branches(steps(), goes_on, begin, last, ends)
        return self._kept[key]

    def _branches(
        self, steps: Sequence[Steps], goes_on: Tensor, begin: Callable[[], Any],
        last: Callable[[], None] | None, ends: int,
    ) -> Callable[[], None]:  # fmt: skip
        if self._on_gpu:
            pieces = [[self._graph(one, begin, keep=True)[0] for one in step] for step in steps]
            end = None if last is None else self._graph(last, begin, keep=True)[0]
            return Branches(pieces, goes_on, end, ends)

        def run() -> None:
            variant = 1
            for step in steps:
                step[variant - 1]()
                variant = 0 if variant == ends else int(goes_on.item())
                if not variant:
                    break
            if last is not None:
                last()

        begin()
        run()
        return run

    def _captured(
        self, function: Callable[[], Any], begin: Callable[[], None], beside: bool
    ) -> Callable[[], Any]:
        """`function` as a CUDA graph that gives the same tensors each time; as it is elsewhere.

        It is run before: compiled code compiles then. Running it twice changes nothing that `begin`
        does not take back.
        """
        if not self._on_gpu:
            function()
            return function
        graph, found = self._graph(function, begin, beside=beside)

        def replay() -> Any:
            graph.replay()
            return found

        return replay

    def _graph(
        self, function: Callable[[], Any], begin: Callable[[], Any], keep: bool = False,
        beside: bool = False,
    ) -> tuple[torch.cuda.CUDAGraph, Any]:  # fmt: skip
        """The graph of a function, and what it gives. keep: the graph itself, not to be run."""
        pool = self._pool_beside if beside else self._pool
        begin()
        function()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            begin()
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph(keep_graph=keep)
        # What other threads do, as NCCL's, is no part of it.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            found = function()
        return graph, found


class Beside:
    """Something that is computed while what follows is, too; on a CPU, before it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is done within. What it is given must be kept until it is awaited."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def await_it(self) -> None:
        """What follows may use it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class Lane(Beside):
    """Likewise, and the host asks whether it is over."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._end = torch.cuda.Event() if self._stream is not None else None

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is done within."""
        with super().work():
            yield
            if self._end is not None:
                self._end.record()

    @property
    def over(self) -> bool:
        """Whether all is done."""
        return self._end is None or self._end.query()

    def wait(self) -> None:
        """Until it is over."""
        if self._end is not None:
            self._end.synchronize()


def compiled(function: F, compile: bool, each: bool = True) -> F:
    """`function`, or what it is compiled to: for each size of its own, or if not `each`, for any,
    once it has met several."""
    dynamic = False if each else None
    found: Any = torch.compile(function, dynamic=dynamic) if compile else function
    return found


@contextmanager
def _compiling(tune: bool, on_gpu: bool) -> Iterator[None]:
    """How what is compiled meanwhile is; see `Graphs.run`."""
    options = {"coordinate_descent_tuning": True} if tune else SAME_SUMS
    choices: AbstractContextManager[Any] = nullcontext()
    if on_gpu and not tune:
        # It takes a second to import, which decoding on a CPU need not wait for.
        from ee_tuning.passes.compiler import compiled_kernels

        choices = compiled_kernels()
    with (
        torch._dynamo.config.patch(recompile_limit=VERSIONS),
        torch._inductor.config.patch(options),
        choices,
    ):
        yield
