"""Where samples come from: torch's own generator for one row, a seed of its own for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014): the
# step from one state to the next, and what makes a number of a state.
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BITS = 23  # of a number; with a half behind them, they are exact in fp32 and never 0 or 1


@dataclass
class Source:
    """Of one row. seed: None for torch's own generator. drawn: how often it was asked.

    With a seed, what is drawn depends on it and on `drawn` alone: neither on other rows nor on the
    device, and rows are drawn together.
    """

    seed: int | None = None
    drawn: int = 0


class Generators:
    """Sources for the samples of a stream's rows.

    A row that has a seed keeps it. Of the others the first has torch's own, so that a single prompt
    is continued as by transformers. Each of the rest has one for itself: no row's samples depend on
    how fast another one is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rows = device, 0
        on_gpu = device.type == "cuda"
        self._state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
        self._seeds = torch.Generator()

    def give(self, source: Source) -> None:
        """Make it the next row's."""
        source.seed, source.drawn = None, 0
        self.rows += 1
        if self.rows == 2:
            # One number of torch's own, and no more: the next stream will come across the others.
            copied = torch.Generator(self.device)
            copied.set_state(self._state)
            self._seeds.manual_seed(_seed(copied))
        if self.rows > 1:
            source.seed = _seed(self._seeds)

    def close(self) -> None:
        """Move torch's own on, if it has seeded others, which the next stream's shall not equal."""
        if self.rows > 1:
            torch.rand((), device=self.device)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), device=generator.device, generator=generator))


def exponential(sources: Sequence[Source], like: Tensor) -> Tensor:
    """A row of exponentially distributed numbers from each source: (R, V), like these."""
    found = torch.empty_like(like)
    seeded = [row for row, source in enumerate(sources) if source.seed is not None]
    if seeded:
        drawn = -_numbers([sources[row] for row in seeded], like.shape[1], like.device).log()
        if len(seeded) == len(sources):
            return drawn.to(like.dtype)
        found[torch.tensor(seeded, device=like.device)] = drawn.to(like.dtype)
    for row, source in enumerate(sources):
        if source.seed is None:
            found[row].exponential_()
            source.drawn += 1
    return found


def uniform(sources: Sequence[Source], counts: Sequence[int], device: torch.device) -> Tensor:
    """Numbers between 0 and 1, `counts` of them from each source: (R, largest count) fp32."""
    found = torch.zeros(len(sources), max(counts), device=device)
    rows = [row for row, count in enumerate(counts) if count]
    seeded = [row for row in rows if sources[row].seed is not None]
    if seeded:
        drawn = _numbers([sources[row] for row in seeded], max(counts), device)
        found[torch.tensor(seeded, device=device)] = drawn
    for row in rows:
        if sources[row].seed is None:
            found[row, : counts[row]] = torch.rand(counts[row], device=device)
            sources[row].drawn += 1
    return found


def _numbers(sources: Sequence[Source], count: int, device: torch.device) -> Tensor:
    """The next `count` numbers of each source, between 0 and 1, neither included: (n, count)."""
    states = []
    for source in sources:
        assert source.seed is not None
        state = _mixed(source.seed + (source.drawn + 1) * STEP)
        states.append(_signed(state))
        source.drawn += 1
    steps = torch.arange(1, count + 1, device=device) * _signed(STEP)
    return spread(torch.tensor(states, device=device)[:, None] + steps)


def spread(x: Tensor) -> Tensor:
    """Numbers between 0 and 1, neither included, fp32, of states, int64 of any shape."""
    return (_shifted(mixed(x), 64 - BITS).float() + 0.5) / 2**BITS


def mixed(x: Tensor) -> Tensor:
    """States, int64 of any shape, each turned into one that looks like no other."""
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    return x ^ _shifted(x, 31)


def _mixed(x: int) -> int:
    x %= 2**64
    x = (x ^ (x >> 30)) * FIRST % 2**64
    x = (x ^ (x >> 27)) * SECOND % 2**64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The same 64 bits as torch has them: products go over the edge alike."""
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> by) & (2 ** (64 - by) - 1)
