"""A start for new exits, fitted in closed form to what the backbone does at its end.

Ridge regression, as for a tuned lens (arXiv 2303.08112), over one pass through some of the data:

* Of an exit with a head of its own, W: a map A from its features to the final exit's at the same
  token. The head becomes W·A, so that nothing is added to the exit.
* Of one that shares the backbone's head: a factor for each of the features, which its norm takes.
* Of a draft exit: `first` from what it reads to the hidden state that enters the backbone's last
  layer at the same token, of which the block is a copy; then `later` to the same, from the token
  and the first draft's output at the token before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ee_tuning.exit_config import DRAFT
from ee_tuning.exits import Exit
from ee_tuning.exits.draft import before
from ee_tuning.losses import IGNORED, next_tokens
from ee_tuning.model import Descent, Network
from ee_tuning.tune.optimizers import working_copies
from ee_tuning.tune.step import Batch, Tuner

TOKENS = 100_000  # to fit to, at most, where these are enough
ENOUGH, TOKENS_PER_VALUE = 4, 100  # for each value that a map reads, at least; at most
RIDGE = 1e-3  # penalty, in mean squares of each value that is read

Rows = tuple[Tensor, Tensor]


def tokens_to_fit(model: Network) -> int:
    """How many tokens of the data are enough for the exits of `model`."""
    values = _values(model)
    return min(max(TOKENS, ENOUGH * values), TOKENS_PER_VALUE * values)


def fitted_to(model: Network, tokens: int, seconds: float) -> str:
    """What there is to say of a fit to so many tokens."""
    said = f"exits fitted to {tokens:,} tokens in closed form, {seconds:.0f} s"
    if tokens >= ENOUGH * (values := _values(model)):
        return said
    return (
        f"{said}: few for maps of {values:,} values: more steps, or --init copy, may begin better"
    )


def _values(model: Network) -> int:
    """That the largest map reads."""
    return (1 + len(model.sources)) * int(model.config.hidden_size)


@torch.no_grad()
def fit(tuner: Tuner, batches: Sequence[Batch], but: str = "") -> None:
    """Fit the exits of a model, in place, to the labelled tokens of `batches`, on the host.

    The exits are as they were copied, and all layers are in memory, in a pipeline those of this
    stage. Of several data-parallel ranks each brings its share of the batches, and all find the
    same maps. but: an architecture whose exits stay as they are.
    """
    model = tuner.model
    specs = model.exit_config.specs(model.backbone.num_layers)
    fitted = {spec.layer for spec in specs if spec.layer != DRAFT and spec.arch != but}
    if fitted:  # in whatever stage: all of them run the batches
        _fit_heads(tuner, [k for k in model.exit_layers if k in fitted], batches)
    if model.sources:
        _fit_draft(tuner, batches)


class _Squares:
    """Sums over tokens of products of what a map reads, (R, N), and of what it is to give."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, read: Tensor, wanted: Tensor) -> None:
        """More rows: (R, N) and (R, M)."""
        read, wanted = read.float(), wanted.float()
        # All tokens count alike, also those whose states are a hundred times larger.
        scale = read.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        x, y = read * scale, wanted * scale
        found = (x.T @ torch.cat([x, y], dim=1)).double()
        self.sums = found if self.sums is None else self.sums.add_(found)

    def factors(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """Of least squares, where what is read stands for itself times a factor: (N,) fp32."""
        assert self.sums is not None
        squares, products = total(self.sums).chunk(2, dim=1)
        return (products.diagonal() / squares.diagonal().clamp(min=1e-12)).float()

    def map(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """The map of least squares, (M, N) fp32. total: sums over processes."""
        assert self.sums is not None
        sums = total(self.sums)
        size = len(sums)
        squares = sums[:, :size]
        squares.diagonal().mul_(1 + RIDGE).add_(1e-12)
        return torch.linalg.solve(squares, sums[:, size:]).T.float()


def _fit_heads(tuner: Tuner, fitted: list[int], batches: Sequence[Batch]) -> None:
    """Fold maps of features into the exits' own heads, or factors into their norms."""
    model, backbone = tuner.model, tuner.model.backbone
    squares = {layer: _Squares() for layer in fitted}
    for batch in batches:
        placed, rows = tuner.place(batch), {}
        asked = next_tokens(placed["labels"]) != IGNORED
        with tuner.cast():
            descent = tuner.transport.enter(model, placed, ends=True)
            if not model.exit_layers:
                continue
            wanted = backbone.norm(tuner.final(descent))[asked]
            for layer in fitted:
                exit = model.exit(layer)
                with working_copies(exit, tuner.autocast):
                    rows[layer] = exit.features(descent.to(layer))[asked]
        for layer, features in rows.items():
            bias = shared_bias(model.exit(layer))
            squares[layer].add(features - bias, wanted - bias)
    tuner.transport.settle()
    for layer in fitted:
        exit = model.exit(layer)
        if not exit.output.shared:
            weight: Tensor = exit.head.weight  # type: ignore[assignment]
            weight.copy_(weight.float() @ squares[layer].map(tuner.transport.total))
        elif exit.norm is not None:
            scale_norm(exit.norm, squares[layer].factors(tuner.transport.total))


def shared_bias(exit: Exit) -> Tensor | float:
    """What an exit's norm adds that stays as it is: (H,), or 0."""
    bias = getattr(exit.norm, "bias", None) if exit.output.shared else None
    return 0.0 if bias is None else bias


def scale_norm(norm: nn.Module, factors: Tensor) -> None:
    """Let a norm give each of its values (H,) times a factor, but for its bias."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None:
        return  # there are norms without
    kept = weight.clone()
    weight.zero_()
    given = norm(torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device))
    # Some families multiply by 1 + weight.
    one = float((given if bias is None else given - bias).abs().max() > 0)
    weight.copy_((kept + one) * factors - one)


def _fit_draft(tuner: Tuner, batches: Sequence[Batch]) -> None:
    """Fit `first`, then `later`, to the state that enters the last layer.

    Of a pipeline, on the stage that has it; the others bring the batches there.
    """
    draft = tuner.model.draft

    def first(placed: Batch, states: Tensor) -> Tensor:
        assert draft is not None
        return draft.first_input(placed["input_ids"], states, placed["position_ids"])

    def later(placed: Batch, states: Tensor) -> Tensor:
        assert draft is not None
        ids, positions = placed["input_ids"], placed["position_ids"]
        h = draft.first_step(ids, states, positions, boundaries=placed.get("boundaries"))
        return draft.later_input(ids, before(h, positions), positions)

    for name, read in (("first", first), ("later", later)):
        squares = _Squares()
        for batch in batches:
            placed = tuner.place(batch)
            asked = next_tokens(placed["labels"]) != IGNORED
            with tuner.cast():
                descent = tuner.transport.enter(tuner.model, placed)
                if draft is None:
                    continue
                with working_copies(draft, tuner.autocast):
                    states, wanted = _states(tuner.model, descent, placed)
                    squares.add(read(placed, states)[asked], wanted[asked])
        tuner.transport.settle()
        if draft is not None:
            linear: nn.Linear = getattr(draft, name)
            linear.weight.copy_(squares.map(tuner.transport.total))


def _states(model: Network, descent: Descent, placed: Batch) -> Rows:
    """What the first draft is given, (B, T, n·H), and what enters the last layer, (B, T, H)."""
    enters, start = model.backbone.num_layers - 1, model.stage.start
    hidden, kept = descent.hidden, {**descent.kept, start: descent.hidden}
    cuts = sorted(layer for layer in {*model.sources, enters} if layer > start)
    part = model.chain.part
    for segment in model.segments([], sources=cuts):
        if part:
            part.prepare(segment)
        given = hidden, placed["position_ids"]
        hidden = segment(*given, boundaries=placed.get("boundaries")).hidden
        kept[segment.stop] = hidden
    states, wanted = torch.cat([kept[layer] for layer in model.sources], dim=-1), kept[enters]
    if part:
        states, wanted = part.gather(states), part.gather(wanted)
    return before(states, placed["position_ids"]), wanted
