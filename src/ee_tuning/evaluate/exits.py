"""Each exit on held-out data: loss, agreement with the final exit, confidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ee_tuning.config import EvaluateConfig
from ee_tuning.data import Rows, collate
from ee_tuning.decode.settings import make_policy
from ee_tuning.errors import UserError
from ee_tuning.evaluate.intervals import bootstrap
from ee_tuning.losses import IGNORED, confidence, cross_entropy
from ee_tuning.model import Network
from ee_tuning.parallel.data import collect, deal
from ee_tuning.parallel.mesh import ALONE, Mesh

Track = Callable[[Sequence[Any]], Iterable[Any]]  # goes through something, and tells how far it is


@dataclass
class Predictions:
    """What one exit says of the labelled tokens: per batch its summed loss, of how many that the
    exits know, and (N,) each the likeliest tokens and their confidences, on the CPU."""

    layer: int
    losses: list[float] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    confidences: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, labels: Tensor, known: Tensor, measure: str) -> None:
        """Add a batch: logits (B, T, V), labels (B, T), and those that the exits know.

        measure: of confidence.
        """
        loss = cross_entropy(logits, known)
        self.losses.append(loss.total.item())
        self.known.append(int(loss.count))
        labelled = logits[:, :-1][labels[:, 1:] != IGNORED]
        self.tokens.append(labelled.argmax(-1).cpu())
        self.confidences.append(confidence(labelled, measure).cpu())


@torch.inference_mode()
def measure_exits(
    model: Network,
    packed: Rows,
    config: EvaluateConfig,
    thresholds: list[float],
    mesh: Mesh = ALONE,
    track: Track = iter,
) -> dict[str, Any]:
    """One pass over at most ``config.max_tokens`` tokens (but a whole row), exit after exit.

    mesh: the ranks that share the batches, and all get the result. track: told what is gone
    through.

    Returns ``exit_rows`` (layer, loss in nats per token, top-1 agreement with the final exit,
    mean confidence; the first two with an interval over batches), ``unknown_targets``, the share of
    tokens that a reduced vocabulary of the exits lacks, whose losses are left out of every row, and
    ``next_token``: per threshold, what would happen to each token if the text before it were the
    data's: agreement with the final exit, its interval and mean depth.

    Raises:
        UserError: an active exit does not exist, or no token of these rows has a label.
    """
    active = active_exits(model, config)
    *exits, final = [_of_all(found, mesh) for found in _predict(model, packed, config, mesh, track)]
    taken = torch.cat(final.tokens)
    if not len(taken):
        raise UserError("the data that were read have no labels: raise --max-tokens")
    sizes = [len(tokens) for tokens in final.tokens]
    rows = [_exit_row(one, taken, sizes) | {"final": one is final} for one in (*exits, final)]
    inner = [found for found in exits if found.layer in active]
    return {
        "data_tokens": len(taken),
        "exit_rows": rows,
        "unknown_targets": 1 - sum(final.known) / len(taken),
        "next_token": [_leave(inner, taken, final.layer, t, sizes) for t in thresholds],
    }


def unknown_text(result: dict[str, Any]) -> str | None:
    """What a reduced vocabulary of the exits leaves out."""
    if not result["unknown_targets"]:
        return None
    return (
        f"{result['unknown_targets']:.1%} of the tokens are not in the exits' vocabulary: they are "
        "left out of every loss; where full depth takes such a token, no exit agrees"
    )


def active_exits(model: Network, config: EvaluateConfig) -> list[int]:
    """The layers at which a token may leave before full depth, as the decoder reads the settings.

    Raises:
        UserError: `exit_layers` names a layer without an exit, or `max_pending` lets none leave.
    """
    leaving = config.leaving(mode="threshold", threshold=0.0)
    return list(make_policy(model, leaving).thresholds)


def _of_all(own: Predictions, mesh: Mesh) -> Predictions:
    """Those of all ranks' batches, in the order of one process."""
    batches = zip(own.losses, own.known, own.tokens, own.confidences, strict=True)
    whole = Predictions(own.layer)
    for loss, known, tokens, sure in collect(list(batches), mesh):
        whole.losses.append(loss)
        whole.known.append(known)
        whole.tokens.append(tokens)
        whole.confidences.append(sure)
    return whole


def _predict(
    model: Network, packed: Rows, config: EvaluateConfig, mesh: Mesh, track: Track
) -> list[Predictions]:
    """Predictions of every exit, by depth, and of the final exit, on the same tokens.

    Of the batches of this process.
    """
    exits = [Predictions(layer) for layer in model.exit_layers]
    final = Predictions(model.backbone.num_layers)
    rows = packed.count(max(1, config.max_tokens // config.seq_length))
    size = config.micro_batch_size
    for start in track(deal(range(0, rows, size), mesh)):
        batch = collate(packed, range(start, min(start + size, rows)))
        batch["known"] = model.known_labels(batch["labels"])
        batch = {name: values.to(model.backbone.device) for name, values in batch.items()}
        descent = model.chain.descend(batch["input_ids"], batch["position_ids"])
        labels = batch["labels"], batch["known"], config.measure
        for found in exits:
            # Never given a name here: one exit's logits are gone when the next one's are made.
            found.add(model.exit(found.layer)(descent.to(found.layer)), *labels)
        final.add(model.backbone.final_logits(descent.ahead(final.layer)), *labels)
    return [*exits, final]


def _exit_row(found: Predictions, final: Tensor, sizes: list[int]) -> dict[str, Any]:
    """One exit's figures; `final` (N,) is what the final exit takes, in batches of `sizes`."""
    same = torch.cat(found.tokens) == final
    return {
        "layer": found.layer,
        "loss": sum(found.losses) / max(1, sum(found.known)),
        "loss_interval": bootstrap(found.losses, found.known),
        "agreement": _share(same),
        "agreement_interval": _interval(same, sizes),
        "confidence": torch.cat(found.confidences).mean().item(),
    }


def _leave(
    exits: list[Predictions], final: Tensor, depth: int, threshold: float, sizes: list[int]
) -> dict[str, Any]:
    """Every token leaves at its first exit that is sure enough; threshold 1 switches exits off."""
    taken, depths = final.clone(), torch.full(final.shape, float(depth))
    for found in reversed(exits) if threshold < 1 else ():
        leaves = torch.cat(found.confidences) >= threshold
        taken[leaves] = torch.cat(found.tokens)[leaves]
        depths[leaves] = found.layer
    same = taken == final
    return {
        "agreement": _share(same),
        "interval": _interval(same, sizes),
        "mean_depth": depths.mean().item(),
    }


def _interval(mask: Tensor, sizes: list[int]) -> list[float]:
    """Of the share of (N,), over batches of `sizes`."""
    return bootstrap([part.sum().item() for part in mask.split(sizes)], sizes)


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()
