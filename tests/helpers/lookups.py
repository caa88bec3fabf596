"""Rounds whose drafts come from texts whether that pays or not."""

from __future__ import annotations

import random

import pytest

from ee_tuning.decode.lookup import TextDrafts
from ee_tuning.decode.pace import Clock
from helpers.prompts import prompt


def repeating(length: int, seed: int = 0) -> list[int]:
    """A prompt in which runs of tokens come again."""
    draw = random.Random(seed)
    runs = [prompt(draw.randint(1, 5), seed + one) for one in range(3)]
    return [token for _ in range(length) for token in draw.choice(runs)][:length]


def let_texts_draft(monkeypatch: pytest.MonkeyPatch, most: int = 0, share: float = 1.0) -> None:
    """Rounds have as many drafts as they may, up to `most` if that is given.

    share: of rounds in which a text has drafts, how many take these, by lot, not exits' ones.
    """
    draw = random.Random(0)

    def promised(paces, *_):
        texts = any(isinstance(pace, TextDrafts) for pace in paces)
        return 99.0 if texts and draw.random() < share else 0.0

    monkeypatch.setattr(Clock, "looks", lambda clock: False)
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda paces, *_: most or paces[0].longest)
    monkeypatch.setattr("ee_tuning.decode.limits.promised", promised)
