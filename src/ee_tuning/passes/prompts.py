"""Reading prompts: whole ones in a pass that is not compiled, side by side where that changes
nothing, or short ones in windows, together, where passes are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ee_tuning.passes.graphs import CHUNK
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.wanted import Read, Wanted, Window

CHUNKS = 4  # prompts of so many chunks at most are read as windows, if compiled
BESIDE = 512  # tokens of prompts in one pass, if there are several

Inputs = Mapping[int, Sequence[int] | Tensor]
Starts = Callable[[int], list[int]]


def read(
    passes: Passes, given: Inputs, last: int, wanted: Wanted, starts: Starts
) -> Iterator[list[Read]]:
    """Read prompts into empty slots, through segment `last`: those that a pass ends together.

    given: by slot, ids or for a later stage hidden states (P, H). starts: of a segment, as for
    `Passes.window`, whatever it says of these slots.
    """
    short = {
        slot: inputs
        for slot, inputs in given.items()
        if passes.compile and len(inputs) <= CHUNK * CHUNKS
    }
    # An exit that predicts reads its own text alone: its products have no order of their own.
    beside = passes.beside and (wanted.final or wanted.after == "nothing")
    whole = {slot: inputs for slot, inputs in given.items() if slot not in short}
    for some in _groups(whole, BESIDE if beside else 0):
        for found in passes.prompts(some, last, wanted):
            yield [found]
    every, together = list(short), passes.sizes.together
    for first in range(0, len(every), together):
        some = {slot: short[slot] for slot in every[first : first + together]}
        yield from _in_chunks(passes, some, last, wanted, starts)


def _groups(given: Inputs, most: int) -> Iterator[Inputs]:
    """Prompts in turn, several of `most` tokens in all, or one."""
    some: dict[int, Sequence[int] | Tensor] = {}
    for slot, inputs in given.items():
        if some and sum(map(len, some.values())) + len(inputs) > most:
            yield some
            some = {}
        some[slot] = inputs
    if some:
        yield some


def _in_chunks(
    passes: Passes, given: Inputs, last: int, wanted: Wanted, starts: Starts
) -> Iterator[list[Read]]:
    """Prompts by compiled passes, together: where launching takes longer than computing."""
    hidden: dict[int, list[Tensor]] = {slot: [] for slot in given}
    first = 0
    while left := [slot for slot in given if len(given[slot]) > first]:
        chunks = [given[slot][first : first + CHUNK] for slot in left]
        ends = [slot for slot in left if len(given[slot]) <= first + CHUNK]
        if not passes.is_first:
            passes.put(*_places(left, chunks, first), torch.cat(chunks))  # type: ignore[arg-type]
        for i in range(last + 1):
            windows = [
                Window(slot, len(chunk), chunk if passes.is_first else ())  # type: ignore[arg-type]
                for slot, chunk in zip(left, chunks, strict=True)
            ]
            known = starts(i)
            for slot in left:
                known[slot] = first
            asked = wanted if i == last and ends else Wanted("nothing", False)
            # The last chunk as the others: of few tokens nothing else is compiled.
            found = passes.window(i, windows, known, asked, least=CHUNK)
        if not passes.is_last:
            taken = passes.take(*_places(left, chunks, first)).split(list(map(len, chunks)))
            for slot, states in zip(left, taken, strict=True):
                hidden[slot].append(states)
        rows = {slot: row for row, slot in enumerate(left)}
        yield [
            Read(slot, found, rows[slot], None if passes.is_last else torch.cat(hidden[slot]))
            for slot in ends
        ]
        first += CHUNK


def _places(
    slots: Sequence[int], chunks: Sequence[Sequence[int] | Tensor], first: int
) -> tuple[list[int], list[int]]:
    """The slot and the position of every token of chunks that begin at position `first`."""
    each = [slot for slot, chunk in zip(slots, chunks, strict=True) for _ in chunk]
    return each, [first + place for chunk in chunks for place in range(len(chunk))]
