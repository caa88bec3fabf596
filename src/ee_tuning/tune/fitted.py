"""A start for a draft exit: its maps fitted in closed form to what the backbone does.

Ridge regression, as for a tuned lens (arXiv 2303.08112): `first` from what it reads to the hidden
state that enters the backbone's last layer at the same token, of which the block is a copy; then
`later` to the same, from the token and the first draft's output at the token before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ee_tuning.exits import DraftExit
from ee_tuning.exits.draft import before
from ee_tuning.losses import IGNORED, next_tokens
from ee_tuning.model import Network
from ee_tuning.tune.step import Batch, to_device

TOKENS = 2**16  # to fit to, at most: some twenty for each of the values that `first` reads
RIDGE = 1e-3  # penalty, in mean squares of a value that is read

Rows = Callable[[Batch], tuple[Tensor, Tensor]]


@torch.no_grad()
def fit_draft(model: Network, batches: Iterable[Batch]) -> None:
    """Fit the maps of the draft exit of `model`, in place, to the labelled tokens of `batches`.

    The backbone has its layers in memory, and the exit is as it was copied.
    """
    draft, batches = model.draft, [*batches]
    assert draft is not None

    def first(batch: Batch) -> tuple[Tensor, Tensor]:
        states, target = _states(model, batch)
        return draft.first_input(batch["input_ids"], states, batch["position_ids"]), target

    def later(batch: Batch) -> tuple[Tensor, Tensor]:
        ids, positions = batch["input_ids"], batch["position_ids"]
        states, target = _states(model, batch)
        h = before(draft.first_step(ids, states, positions), positions)
        return draft.later_input(ids, h, positions), target

    for linear, rows in ((draft.first, first), (draft.later, later)):
        linear.weight.copy_(_ridge(rows, batches, draft))


def _states(model: Network, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the first draft is given, (B, T, n·H), and what enters the last layer, (B, T, H)."""
    draft, enters = model.draft, model.backbone.num_layers - 1
    assert draft is not None
    hidden, kept = batch["input_ids"], {}
    for segment in model.segments([], sources=sorted({*draft.sources, enters} - {0})):
        hidden = segment(hidden, batch["position_ids"]).hidden
        kept[segment.stop] = hidden
    states = torch.cat([kept[layer] for layer in draft.sources], dim=-1)
    return before(states, batch["position_ids"]), kept[enters]


def _ridge(rows: Rows, batches: Iterable[Batch], draft: DraftExit) -> Tensor:
    """The map of least squares, (H, N), from the rows of all batches, (R, N) to (R, H)."""
    products: Tensor | None = None
    number = 0
    for batch in batches:
        batch = {name: to_device(batch[name], draft.first.weight.device) for name in batch}
        read, target = rows(batch)
        asked = next_tokens(batch["labels"]) != IGNORED
        x, y = read[asked].float(), target[asked].float()
        found = (x.T @ torch.cat([x, y], dim=1)).double()
        products = found if products is None else products.add_(found)
        number += len(x)
    assert products is not None
    size = len(products)
    squares = products[:, :size]
    squares.diagonal().add_(RIDGE * max(1, number))
    return torch.linalg.solve(squares, products[:, size:]).T
