"""Log-likelihoods of given texts, whose tokens leave where they would in decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_tuning.decode.given import Given, exits_before_end, predictions
from ee_tuning.decode.settings import Policy
from ee_tuning.decode.wanted import Predictions
from ee_tuning.model import Network


@dataclass(frozen=True)
class Scored:
    """What is said of a text's last tokens.

    log_likelihood: their sum, in nats; −∞ if one of them left at an exit that does not know it.
    greedy: whether each is the one that would have been taken. layers: where each left.
    """

    log_likelihood: float
    greedy: bool
    layers: list[int]


@dataclass
class _Place:
    """What one exit, or the end, says before each of a batch's tokens, by row and place: the next
    token's log-probability, and the likeliest token with how sure that is."""

    given: list[list[float]]
    said: Predictions


@torch.inference_mode()
def score(model: Network, policy: Policy, texts: Sequence[tuple[list[int], int]]) -> list[Scored]:
    """Score texts of at least two tokens, each with how many of its last ones count.

    The tokens that count leave as `Given` says, the first of them at the end.
    """
    longest = max(len(ids) for ids, _ in texts)
    rows = [ids + [ids[-1]] * (longest - len(ids)) for ids, _ in texts]  # nobody looks ahead
    places = _places(model, policy, torch.tensor(rows, device=model.backbone.device))
    return [_follow(policy, places, row, *text) for row, text in enumerate(texts)]


def _places(model: Network, policy: Policy, ids: Tensor) -> dict[int, _Place]:
    """By layer, what is said there of ids (B, T + 1)."""
    descent = model.chain.descend(ids[:, :-1])
    found = {}
    for layer in exits_before_end(policy):
        logits = model.exit(layer)(descent.to(layer))
        found[layer] = _place(logits, ids[:, 1:], policy.measure)
    if policy.final:
        logits = model.backbone.final_logits(descent.ahead(policy.end))
    else:
        logits = model.exit(policy.end)(descent.to(policy.end))
    found[policy.end] = _place(logits, ids[:, 1:], policy.measure)
    return found


def _place(logits: Tensor, targets: Tensor, measure: str) -> _Place:
    logits = logits.float()
    given = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    return _Place(given.tolist(), predictions(logits, measure))


def _follow(
    policy: Policy, places: dict[int, _Place], row: int, ids: list[int], count: int
) -> Scored:
    """Where the last `count` tokens of a text leave, and what is said of them there."""
    given, exits = Given(policy), exits_before_end(policy)
    layers, total, greedy = [], 0.0, True
    for at in range(len(ids) - count, len(ids)):
        said = {layer: places[layer].said.at(row, at - 1) for layer in exits}
        layer = given.layer(said, ids[:at])
        total += places[layer].given[row][at - 1]
        greedy = greedy and places[layer].said.at(row, at - 1).token == ids[at]
        layers.append(layer)
    return Scored(total, greedy, layers)
