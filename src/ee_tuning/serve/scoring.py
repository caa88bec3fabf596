"""Whole texts: how likely their tokens are, and what every exit says after each of them.

One pass over a text gives what decoding would have seen, since decoding computes all K/V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ee_tuning.decode import Policy
from ee_tuning.decode.given import Given, exits_before_end, predictions
from ee_tuning.exit_config import DRAFT
from ee_tuning.losses import confidence
from ee_tuning.model import Network
from ee_tuning.serve.processors import Likely, likely

CHUNK = 128  # positions whose logits are there at a time


@torch.inference_mode()
def score(model: Network, ids: Sequence[int], policy: Policy, top: int) -> list[Likely]:
    """How likely the tokens of a text are, from the second on, where they would have left: see
    `ee_tuning.decode.given`."""
    exits, given, found = exits_before_end(policy), Given(policy), list[Likely]()
    asked = exits if policy.final else [*exits, policy.end]
    for start, said in _said(model, ids[:-1], 0, asked, policy.final):
        logits = said[policy.end]
        heard = {layer: predictions(said[layer][None], policy.measure) for layer in exits}
        for place in range(len(logits)):
            at = {layer: heard[layer].at(0, place) for layer in exits}
            layer = given.layer(at, ids[: start + place + 1])
            if layer != policy.end:
                logits[place] = said[layer][place]
        tokens = ids[start + 1 : start + 1 + len(logits)]
        found += likely(logits.log_softmax(-1), tokens, top)
    return found


@torch.inference_mode()
def lens(
    model: Network, ids: Sequence[int], first: int, exit_layers: Sequence[int], top: int = 5
) -> list[list[dict[str, Any]]]:
    """For each token of a text from place `first` on, what every exit and the end said of it.

    By depth: layer, confidence, and the `top` likeliest tokens with their probabilities.
    """
    layers = [layer for layer in exit_layers if layer not in (DRAFT, model.backbone.num_layers)]
    found: list[list[dict[str, Any]]] = [[] for _ in ids[first:]]
    for start, said in _said(model, ids[:-1], first - 1, layers, True):
        for layer, logits in said.items():
            sure = confidence(logits).tolist()
            values, tokens = logits.softmax(-1).topk(min(top, logits.shape[-1]), -1)
            rows = zip(sure, tokens.tolist(), values.tolist(), strict=True)
            for place, (own, ids_, p) in enumerate(rows):
                pairs = [[token, round(value, 4)] for token, value in zip(ids_, p, strict=True)]
                found[start - (first - 1) + place].append(
                    {"layer": layer, "confidence": round(own, 4), "top": pairs}
                )
    return found


def _said(
    model: Network, ids: Sequence[int], first: int, layers: Sequence[int], final: bool
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Logits (T, V) fp32 after the tokens of a text from place `first` on, by layer and depth.

    Chunk by chunk, with the place that each begins with. final: those of the end, too.
    """
    if not ids:
        return
    descent = model.chain.descend(torch.tensor([list(ids)], device=model.backbone.device))
    features = {layer: model.exit(layer).features(descent.to(layer)) for layer in sorted(layers)}
    depth = model.backbone.num_layers
    hidden = descent.ahead(depth) if final else None
    for start in range(first, len(ids), CHUNK):
        stop = min(start + CHUNK, len(ids))
        said = {
            layer: model.exit(layer).logits(own[:, start:stop])[0].float()
            for layer, own in features.items()
        }
        if hidden is not None:
            said[depth] = model.backbone.final_logits(hidden[:, start:stop])[0].float()
        yield start, said
