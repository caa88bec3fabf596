"""Whether speculation pays here and now: what was measured says so."""

from __future__ import annotations

from collections import defaultdict

MODES = ("speculative", "full")


class Faster:
    """Tokens per second of texts in both modes, lately, by how many there were at a time."""

    FORGETS = 0.8  # of what was measured, the share that still counts a text later
    LOOKS = 24  # of so many texts, one goes the way that seems slower

    def __init__(self) -> None:
        self._speeds: dict[tuple[str, int], float] = {}
        self._asked: dict[int, int] = defaultdict(int)

    def mode(self, busy: int) -> str:
        """Of the next text, beside so many others."""
        size = busy.bit_length()
        self._asked[size] += 1
        unknown = [mode for mode in MODES if (mode, size) not in self._speeds]
        if unknown:
            return unknown[self._asked[size] % len(unknown)]
        best = max(MODES, key=lambda mode: self._speeds[mode, size])
        if self._asked[size] % self.LOOKS:
            return best
        return next(mode for mode in MODES if mode != best)

    def learn(self, mode: str, busy: int, speed: float) -> None:
        """Take in the tokens per second of a text."""
        key = mode, busy.bit_length()
        before = self._speeds.get(key, speed)
        self._speeds[key] = self.FORGETS * before + (1 - self.FORGETS) * speed
