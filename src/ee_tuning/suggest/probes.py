"""Exits that are tuned for a minute, and what they say of the backbone's own texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ee_tuning.backbone import State
from ee_tuning.config import Leaving, TuneConfig
from ee_tuning.decode import generate_batch
from ee_tuning.exit_config import DRAFT
from ee_tuning.losses import Objective, confidence
from ee_tuning.model import Network
from ee_tuning.suggest.predict import Chains, Heard
from ee_tuning.tune.optimizers import build_optimizers, set_learning_rate
from ee_tuning.tune.step import Batch, Tuner

SLOTS = 16  # texts that are written at a time
ROWS = 4  # of a step
STEPS = 200  # at most
RATE, WARMUP = 3e-3, 5  # of a probe: it has little to learn and little time


def written(
    model: Network,
    prompts: list[list[int]],
    new: int,
    seed: int | None = None,
    seconds: float = float("inf"),
) -> list[list[int]]:
    """Prompts with `new` tokens that the backbone says after them: the likeliest, or samples.

    seconds: after which no more of them are begun.
    """
    settings: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
        settings |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.95}
    end = time.perf_counter() + seconds
    begun = (ids for i, ids in enumerate(prompts) if i < SLOTS or time.perf_counter() < end)
    capacity = max(map(len, prompts)) + new
    size: dict[str, Any] = {"slots": SLOTS, "capacity": capacity, "compile": False}
    found = generate_batch(model, begun, mode="full", **size, **settings)
    texts = {i: output.sequences[0].tolist() for i, output in found if output.sequences is not None}
    return [texts[i] for i in sorted(texts)]


def batches(texts: Sequence[list[int]]) -> list[Batch]:
    """Micro-batches of texts of one length."""
    rows = [torch.tensor(list(texts[i : i + ROWS])) for i in range(0, len(texts), ROWS)]
    return [
        {
            "input_ids": ids,
            "labels": ids,
            "position_ids": torch.arange(ids.shape[1]).expand(ids.shape),
        }
        for ids in rows
    ]


def tuned(model: Network, texts: Sequence[list[int]], seconds: float) -> int:
    """Tune all exits for so long, on the final exit's distribution; gives the number of steps."""
    given, usual = batches(texts), TuneConfig()
    if model.draft is not None:
        model.draft.steps, model.draft.decay = usual.draft_steps, usual.draft_decay
    tuner = Tuner(
        model,
        build_optimizers(model, TuneConfig(lr=RATE)),
        Objective("kl"),
        clip=1.0,
        autocast=None if model.dtype == torch.float32 else model.dtype,
    )
    weights = dict.fromkeys(model.exit_layers, 1.0)
    begun = time.perf_counter()
    for step in range(STEPS):
        spent = time.perf_counter() - begun
        done = max(spent / seconds, step / STEPS)
        if done >= 1:
            return step
        for optimizer in tuner.optimizers.values():
            set_learning_rate(optimizer, RATE * min((step + 1) / WARMUP, 1.0) * (1 - 0.9 * done))
        tuner.step([given[step % len(given)]], weights)
    return STEPS


@torch.inference_mode()
def heard(model: Network, texts: Sequence[list[int]], start: int) -> dict[int, list[Heard]]:
    """What every exit says before each token of greedy texts, from place `start` + 1 on.

    start: tokens of the prompts; the one after them always goes to the end. A draft exit has chains
    of up to `Leaving.max_pending` drafts.
    """
    found: dict[int, list[Heard]] = {layer: [] for layer in model.exit_layers}
    for batch in batches(texts):
        ids = batch["input_ids"].to(model.device)
        descent = model.chain.descend(ids[:, :-1])
        for layer in model.exit_layers:
            if layer == DRAFT:
                found[layer] += _chains(model, descent.to(layer), ids, start)
                continue
            logits = model.exit(layer)(descent.to(layer))[:, start:]
            said = zip(*_said(logits, ids[:, start + 1 :]), strict=True)
            found[layer] += [Heard(*one) for one in said]
    return found


def _said(logits: Tensor, following: Tensor) -> tuple[list[list[float]], list[list[bool]]]:
    """How sure, and whether right: (B, T) each."""
    return confidence(logits).tolist(), (logits.argmax(-1) == following).tolist()


def _chains(model: Network, state: State, ids: Tensor, start: int) -> list[Heard]:
    """Of texts (B, T + 1): the j-th draft of a chain stands j − 1 places behind its first one."""
    draft = model.draft
    assert draft is not None
    draft.steps = Leaving.max_pending
    said = [_said(draft.logits(features), ids[:, 1:]) for features in draft.predictions(state)]
    found: list[Heard] = []
    places = range(start, ids.shape[1] - 1)
    for row in range(len(ids)):
        chains = [
            [
                (sure[row][place + step], right[row][place + step])
                for step, (sure, right) in enumerate(said)
                if place + step < places.stop
            ]
            for place in places
        ]
        firsts = [chain[0] for chain in chains]
        found.append(Chains([sure for sure, _ in firsts], [right for _, right in firsts], chains))
    return found
