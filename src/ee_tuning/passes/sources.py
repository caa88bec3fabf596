"""The hidden states that a draft exit reads: after its source layers, for the newest tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ee_tuning.backbone import State
from ee_tuning.passes.cache import places_in
from ee_tuning.passes.graphs import compiled


class Sources:
    """Those of the layers of a process and of the stages before it, in a ring by position.

    layers: the source layers among these, counted from 1. states: (slots, ring, n·H), theirs side
    by side. given: how many numbers of them, the first ones, come from the stages before.
    """

    def __init__(self, layers: Sequence[int], stage: range, ring: Tensor, compile: bool) -> None:
        """layers: all that the exit reads. stage: the layers, counted from 0, of this process.
        ring: (slots, ring, H), like those of `Rings`."""
        self.layers = [layer for layer in layers if layer <= stage.stop]
        self._width = ring.shape[-1]
        self.given = self._width * sum(layer <= stage.start for layer in layers)
        self.states = ring.new_zeros(*ring.shape[:2], self._width * len(self.layers))
        self._keep = compiled(_keep, compile)

    def keep(self, slots: Tensor, positions: Tensor, state: State) -> None:
        """Take in what a segment's pass gives for the tokens of slots (n,) at positions (n, T)."""
        if state.sources:
            end = self._width * sum(layer <= state.stop for layer in self.layers)
            part = slice(end - self._width * len(state.sources), end)
            self._keep(self.states[..., part], slots, positions, state.sources)

    def put(self, slots: Sequence[int], positions: Sequence[int], states: Tensor) -> None:
        """Take in what the stages before give for n tokens: (n, `given`)."""
        self.states[..., : self.given][places_in(self.states, slots, positions)] = states

    def take(self, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """All there is of n tokens: (n, n·H)."""
        return self.states[places_in(self.states, slots, positions)]

    def forget(self, slot: int) -> None:
        """Nothing is left of a slot's text."""
        self.states[slot].zero_()


def side_by_side(states: Sequence[State]) -> Tensor:
    """What one pass of some segments over (B, T) tokens gives of the sources: (B, T, n·H)."""
    found = [one for state in states for one in state.sources]
    return torch.cat(found, -1) if found else states[-1].hidden[..., :0]


def _keep(states: Tensor, slots: Tensor, positions: Tensor, sources: Sequence[Tensor]) -> None:
    """Keep hidden states after some source layers in their part of a ring."""
    states[slots[:, None], positions % states.shape[1]] = torch.cat(list(sources), -1)
