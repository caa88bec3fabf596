"""Ways to decode that `real.py` compares: what each gives for some prompts, and our own.

A way is called with prompts (B, P), padded on the left, and their mask, and gives an `Answer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning import EarlyExitModel
from ee_tuning.decode.pace import Pace
from ee_tuning.exit_config import DRAFT, parse_threshold


@dataclass
class Answer:
    """What a way gave for B prompts.

    texts: the new tokens of each, up to the one that ended it. rounds: passes through the whole
    model. drafted: tokens that were drafted; 0 where there are no drafts. layers: of all new
    tokens, where the way has exits.
    """

    texts: list[list[int]]
    rounds: int = 0
    drafted: int = 0
    layers: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many new ones."""
        return sum(map(len, self.texts))


Way = Callable[[Tensor, Tensor], Answer]


@dataclass
class Settings:
    """What all ways have alike. ends: tokens that end a text. temperature: 0 is greedy."""

    new_tokens: int
    ends: frozenset[int]
    temperature: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """Those of transformers' `generate`, and ours."""
        given: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": False}
        if self.temperature:
            given |= {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return given

    def cut(self, tokens: list[int]) -> list[int]:
        """New tokens without what stands behind a text's end."""
        stops = (place for place, token in enumerate(tokens, start=1) if token in self.ends)
        return tokens[: next(stops, len(tokens))]


@dataclass
class Own:
    """One of our ways: `generate` with these arguments, and how many rows it is warmed up for."""

    model: EarlyExitModel
    way: dict[str, Any]
    settings: Settings

    def __call__(self, ids: Tensor, mask: Tensor) -> Answer:
        """Generate."""
        given = self.settings.arguments() | self.way
        with _drafts_counted() as told:
            out = self.model.generate(ids, attention_mask=mask, **given)
        new = out.sequences[:, ids.shape[1] :].tolist()
        texts = [self.settings.cut(row) for row in new]
        pairs = zip(out.exit_layers.tolist(), texts, strict=True)
        layers = [layer for row, text in pairs for layer in row[: len(text)]]
        ends = layers.count(self.model.backbone.num_layers)
        return Answer(texts, ends, sum(told), layers)

    def warm_up(self, rows: int, capacity: int) -> float:
        """Compile and capture what so many rows need; gives the seconds."""
        if self.model.device.type != "cuda":
            return 0.0
        given = self.settings.arguments() | self.way
        return self.model.warm_up(slots=rows, capacity=capacity, **given)


@contextmanager
def _drafts_counted() -> Iterator[list[int]]:
    """The numbers of drafts of all rounds meanwhile, as paces are told them."""
    learn, told = Pace.learn, []

    def counted(pace: Pace, limit: int, drafted: int, kept: int) -> None:
        told.append(drafted)
        learn(pace, limit, drafted, kept)

    Pace.learn = counted  # type: ignore[method-assign]
    try:
        yield told
    finally:
        Pace.learn = learn  # type: ignore[method-assign]


def own_ways(model: EarlyExitModel, name: str, args: Any) -> dict[str, dict[str, Any]]:
    """Every mode that the exits of a folder serve, by its name: arguments of `generate`.

    name: of the folder. args: `bars`, `longest`, `thresholds`, `draft_thresholds`.
    """
    found: dict[str, dict[str, Any]] = {}
    if DRAFT in model.all_exit_layers:
        for bar in args.bars:
            for longest in args.longest:
                way = {"mode": "speculative", "threshold": bar, "max_pending": longest}
                found[f"{name}: draft exit, bar {bar:g}, up to {longest}"] = way
                found[f"{name}: draft exit + lookup, bar {bar:g}, up to {longest}"] = {
                    **way, "lookup": True
                }  # fmt: skip
    layers = [layer for layer in model.all_exit_layers if layer != DRAFT]
    if not layers:
        return found
    specs = model.exit_config.specs(model.backbone.num_layers)
    kinds = "+".join(dict.fromkeys(spec.arch for spec in specs if spec.layer in layers))
    label = f"{name}: {kinds} exits at {', '.join(map(str, layers))}"
    named = {"exit_layers": ",".join(map(str, layers))}
    for given in args.thresholds:
        read = parse_threshold(given)
        own = read if isinstance(read, dict) else dict.fromkeys(layers, read)
        way = {"mode": "threshold", "threshold": own, "exit_layers": ",".join(map(str, own))}
        found[f"{label}, threshold {given}"] = way
    for threshold in args.draft_thresholds:
        way = {"mode": "speculative", "threshold": threshold, "max_pending": 4, **named}
        found[f"{label}, speculative {threshold:g}"] = way
    return found


@torch.no_grad()
def next_tokens(
    model: EarlyExitModel, texts: list[tuple[Tensor, list[int]]], thresholds: dict[int, float]
) -> dict[str, float]:
    """What the exits' thresholds do to the next token, given full depth's own texts.

    texts: prompts (1, P) with what full depth wrote. Gives the share of next tokens that are
    another than the final exit's, and the share that leaves.
    """
    differs, leaves, count = 0, 0, 0
    for prompt, text in texts:
        ids = torch.cat([prompt, prompt.new_tensor([text])], dim=1)
        out = model(ids, output_exit_logits=True, output_logits=True)
        places = slice(prompt.shape[1] - 1, ids.shape[1] - 1)
        final = out.logits[0, places].argmax(-1)
        taken, left = final.clone(), torch.zeros_like(final, dtype=torch.bool)
        for layer in sorted(thresholds, reverse=True):
            sure, token = out.exit_logits[layer][0, places].float().softmax(-1).max(-1)
            go = sure >= thresholds[layer]
            taken, left = torch.where(go, token, taken), left | go
        differs += int((taken != final).sum())
        leaves += int(left.sum())
        count += len(final)
    return {
        "next_token_differs": round(differs / max(1, count), 4),
        "next_token_leaves": round(leaves / max(1, count), 4),
    }


def folder_name(path: str) -> str:
    """How the exits of a folder are called in the rows."""
    return Path(path).name
