"""Each exit on held-out data: loss, agreement with the final exit, confidence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ee_tuning.config import EvaluateConfig
from ee_tuning.data import collate
from ee_tuning.losses import IGNORED, confidence, cross_entropy
from ee_tuning.model import EarlyExitModel


@torch.inference_mode()
def measure_exits(
    model: EarlyExitModel, packed: Any, config: EvaluateConfig, thresholds: list[float]
) -> dict[str, Any]:
    """One pass over at most ``config.max_tokens`` tokens, the logits of one exit alive at a time.

    Returns ``exit_rows`` (layer, loss in nats per token, top-1 agreement with the final exit,
    mean confidence) and ``next_token``: per threshold, what would happen to each token if the
    text before it were the data's: agreement with the final exit and mean depth.
    """
    depth = model.backbone.num_layers
    places = [*(layer for layer in model.exit_layers), "final"]
    losses: dict[Any, float] = dict.fromkeys(places, 0.0)
    chosen: dict[Any, list[Tensor]] = {place: [] for place in places}
    sure: dict[Any, list[Tensor]] = {place: [] for place in places}
    rows = max(1, min(len(packed), config.max_tokens // config.seq_length))
    for first in range(0, rows, config.micro_batch_size):
        batch = collate(packed, list(range(first, min(first + config.micro_batch_size, rows))))
        batch = {name: values.to(model.backbone.device) for name, values in batch.items()}
        mask = batch["labels"][:, 1:] != IGNORED
        for place, logits in _all_logits(model, batch):
            losses[place] += cross_entropy(logits, batch["labels"]).total.item()
            logits = logits[:, :-1][mask]
            chosen[place].append(logits.argmax(-1).cpu())
            sure[place].append(confidence(logits).cpu())
    tokens = {place: torch.cat(parts) for place, parts in chosen.items()}
    confidences = {place: torch.cat(parts) for place, parts in sure.items()}
    count = len(tokens["final"])
    exit_rows = [
        {
            "layer": depth if place == "final" else place,
            "final": place == "final",
            "loss": losses[place] / count,
            "agreement": _share(tokens[place] == tokens["final"]),
            "confidence": confidences[place].mean().item(),
        }
        for place in places
    ]
    next_token = [_leave(tokens, confidences, depth, threshold) for threshold in thresholds]
    return {"data_tokens": count, "exit_rows": exit_rows, "next_token": next_token}


def _all_logits(model: EarlyExitModel, batch: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    """(exit layer or "final", logits (B, T, V)), by depth, each computed when asked for."""
    states = model.states(batch["input_ids"], batch["position_ids"], to_end=True)
    for layer, state in states:
        if layer in model.exit_layers:
            yield layer, model.exit(layer)(state)
        if layer == model.backbone.num_layers:
            yield "final", model.backbone.final_logits(state.hidden)


def _leave(
    tokens: dict[Any, Tensor], confidences: dict[Any, Tensor], depth: int, threshold: float
) -> dict[str, float]:
    """Every token leaves at its first exit that is sure enough; threshold 1 switches exits off."""
    taken = tokens["final"].clone()
    depths = torch.full(taken.shape, float(depth))
    exits = [place for place in tokens if place != "final" and place < depth and threshold < 1]
    for place in reversed(exits):
        leaves = confidences[place] >= threshold
        taken[leaves] = tokens[place][leaves]
        depths[leaves] = place
    return {"agreement": _share(taken == tokens["final"]), "mean_depth": depths.mean().item()}


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()
