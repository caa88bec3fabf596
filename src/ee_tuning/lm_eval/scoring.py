"""Log-likelihoods of given texts, whose tokens leave where they would in decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ee_tuning.decode.given import Given, exits_before_end, predictions
from ee_tuning.decode.settings import Policy
from ee_tuning.model import Network
from ee_tuning.passes.wanted import Predictions


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
    """What one exit, or the end, says before each token that counts, those of all texts in a row:
    the next token's log-probability, and the likeliest token with how sure that is."""

    given: list[float]
    said: Predictions


@torch.inference_mode()
def score(model: Network, policy: Policy, texts: Sequence[tuple[list[int], int]]) -> list[Scored]:
    """Score texts of at least two tokens, each with how many of its last ones count.

    The tokens that count leave as `Given` says, the first of them at the end. Logits are made of
    what counts alone.
    """
    places, firsts = _places(model, policy, texts), accumulate((own for _, own in texts), initial=0)
    return [
        _follow(policy, places, first, *text) for first, text in zip(firsts, texts, strict=False)
    ]


def _places(
    model: Network, policy: Policy, texts: Sequence[tuple[list[int], int]]
) -> dict[int, _Place]:
    """By layer, what is said there of the tokens that count."""
    longest, device = max(len(ids) for ids, _ in texts), model.backbone.device
    rows = [ids + [ids[-1]] * (longest - len(ids)) for ids, _ in texts]  # nobody looks ahead
    descent = model.chain.descend(torch.tensor(rows, device=device)[:, :-1])
    counted = [
        (row, place, ids[place + 1])
        for row, (ids, count) in enumerate(texts)
        for place in range(len(ids) - count - 1, len(ids) - 1)
    ]
    row, place, tokens = torch.tensor(counted, device=device).T

    def said(logits_of: Callable[[Tensor], Tensor], features: Tensor) -> _Place:
        logits = logits_of(features[row, place][None]).float()
        given = logits.gather(-1, tokens[None, :, None])[0, :, 0] - logits.logsumexp(-1)[0]
        return _Place(given.tolist(), predictions(logits, policy.measure))

    found = {}
    for layer in exits_before_end(policy):
        exit = model.exit(layer)
        found[layer] = said(exit.logits, exit.features(descent.to(layer)))
    if policy.final:
        hidden = model.backbone.norm(descent.ahead(policy.end))
        found[policy.end] = said(model.backbone.logits, hidden)
    else:
        exit = model.exit(policy.end)
        found[policy.end] = said(exit.logits, exit.features(descent.to(policy.end)))
    return found


def _follow(
    policy: Policy, places: dict[int, _Place], first: int, ids: list[int], count: int
) -> Scored:
    """Where the last `count` tokens of a text leave, and what is said of them there.

    first: the number of the first of them among those of all texts.
    """
    given, exits = Given(policy), exits_before_end(policy)
    layers, total, greedy = [], 0.0, True
    for number, at in enumerate(range(len(ids) - count, len(ids)), start=first):
        said = {layer: places[layer].said.at(0, number) for layer in exits}
        layer = given.layer(said, ids[:at])
        total += places[layer].given[number]
        greedy = greedy and places[layer].said.at(0, number).token == ids[at]
        layers.append(layer)
    return Scored(total, greedy, layers)
