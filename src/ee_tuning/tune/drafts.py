"""How good the drafts of a draft exit are on held-out data, one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_tuning.exit_config import DRAFT
from ee_tuning.exits import DraftExit, Head
from ee_tuning.losses import IGNORED, chunks, cross_entropy
from ee_tuning.model import Descent
from ee_tuning.tune.optimizers import working_copies
from ee_tuning.tune.step import Batch, Tuner


@dataclass
class Drafts:
    """By the number of a draft in its chain, from 1.

    loss: mean cross-entropy, nats per token that the exits know. agreement: with the final exit on
    all labelled tokens, the share of places where both find the same token likeliest; that is how
    often a greedy chain gets one draft further on text of this kind.
    """

    loss: dict[int, float]
    agreement: dict[int, float]


@torch.no_grad()
def measure_drafts(tuner: Tuner, batches: Iterable[Batch], steps: int) -> Drafts:
    """Of a model whose draft exit, perhaps of another stage, has so many `steps`, over `batches`,
    those of all ranks added up."""
    model, draft = tuner.model, tuner.model.draft
    sums = torch.zeros(steps, 4, dtype=torch.float64, device=tuner.device)
    for batch in batches:
        labels, vocabulary = batch["labels"], model.vocabulary
        places = vocabulary.to_places(labels) if vocabulary else labels
        placed = tuner.place(batch | {"known": places})
        with tuner.cast():
            descent = tuner.transport.enter(model, placed)
            if draft is not None:
                with working_copies(draft, tuner.autocast):
                    sums += _measured(tuner, draft, placed, descent)
    tuner.transport.settle()
    values, _ = tuner.transport.totals(sums.flatten().tolist(), 0)
    rows = torch.tensor(values).view(-1, 4).tolist()
    return Drafts(
        {step: row[0] / max(1.0, row[1]) for step, row in enumerate(rows, 1)},
        {step: row[2] / max(1.0, row[3]) for step, row in enumerate(rows, 1)},
    )


def _measured(tuner: Tuner, draft: DraftExit, placed: Batch, descent: Descent) -> Tensor:
    """The sums of `_one` by step, of a micro-batch."""
    model, sums = tuner.model, []
    state = descent.to(DRAFT)
    final, softmax = tuner.final(descent), draft.output.softmax
    predictions = tuner.predictions(DRAFT, state)
    labels = [
        [one for one, _ in draft.targets(placed[name], state)] for name in ("labels", "known")
    ]
    for tokens in chunks(placed["labels"], model.config.vocab_size):
        taken = softmax.likeliest(model.backbone.final_logits(final[:, tokens]))
        for step, features in enumerate(predictions):
            asked, known = (one[step][:, tokens] for one in labels)
            sums.append(_one(draft.output, features[:, tokens], taken, asked, known))
    return torch.stack(sums).view(-1, len(predictions), 4).sum(0)


def _one(head: Head, features: Tensor, taken: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Of a chunk: summed loss and tokens that it is of, places that agree, and all places."""
    logits = head.known_logits(features)
    loss = cross_entropy(logits, known, softmax=head.softmax)
    asked = labels[:, 1:] != IGNORED
    found = head.softmax.likeliest(logits)
    found = found if head.tokens is None else head.tokens[found]
    agree = (found == taken)[:, :-1] & asked
    return torch.stack([loss.total.double(), loss.count, agree.sum(), asked.sum()]).double()
