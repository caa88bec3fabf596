"""What the parts of a model weigh and what they compute, from their shapes alone.

The one place that counts: stages are balanced, drafts priced and runs planned by it. The model may
be on the meta device. `tests/unit/test_costs.py` holds it against torch's FlopCounterMode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

from torch import nn
from transformers import DynamicCache

from ee_tuning.backbone import Backbone
from ee_tuning.exit_config import DRAFT, depth_of
from ee_tuning.exits import DraftExit, Exit
from ee_tuning.exits.archs import WRITES_BACK
from ee_tuning.model import Network

STATES = 3  # hidden states that an exit needs of a token: an `mlp` exit's input is of three tensors


@dataclass(frozen=True)
class Work:
    """What a part of a model keeps, and what it does with one token.

    values: its parameters, those of all experts. weights: elements of the matrices that a token is
    multiplied with, of experts the active ones. products: number of these matrices. gradients: how
    many products their backward takes. width: values of the widest product of a token. forward,
    backward: FLOP.
    """

    values: int = 0
    weights: float = 0.0
    products: int = 0
    gradients: int = 0
    width: float = 0.0
    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.values + other.values,
            self.weights + other.weights,
            self.products + other.products,
            self.gradients + other.gradients,
            max(self.width, other.width),
            self.forward + other.forward,
            self.backward + other.backward,
        )

    @property
    def flop(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class ExitWork:
    """An exit below its head, and the head, of which it keeps nothing if it is shared.

    unsplit: what of it --tp leaves whole on every process.
    """

    below: Work
    head: Work
    shared: bool
    unsplit: Work = Work()

    @property
    def whole(self) -> Work:
        """Both."""
        return self.below + self.head

    def on_rank(self, tp: int) -> float:
        """How many of its values one of `tp` tensor-parallel ranks tunes."""
        return self.unsplit.values + (self.whole.values - self.unsplit.values) / tp


@dataclass(frozen=True)
class Account:
    """The parts of a model.

    layers: of the backbone, all of them. exits: by layer (from 1; a draft exit's is 0, it counts as
    one after the last). reach: the last layer that the exits read, 0 where a stage has none. head:
    the final exit's. embedding: parameters of the token embedding, which are the head's too if they
    are `tied`. hidden: the width of a hidden state. known: share of the vocabulary that the exits
    know.
    """

    layers: list[Work]
    exits: dict[int, ExitWork]
    reach: int
    head: Work
    embedding: int
    tied: bool
    hidden: int
    known: float

    @property
    def deepest(self) -> int:
        """The layer of the deepest exit."""
        return max(map(self._place, self.exits))

    def _place(self, layer: int) -> int:
        """The layer, from 1, whose process has the exit."""
        return layer if layer != DRAFT else len(self.layers)

    def in_stage(self, stage: range) -> list[ExitWork]:
        """The exits after the layers of `stage`, counted from 0."""
        ordered = sorted(self.exits, key=depth_of)
        return [self.exits[layer] for layer in ordered if self._place(layer) - 1 in stage]

    def flop(self, teacher: bool = False) -> dict[str, float]:
        """FLOP per token of a tuning step, by part.

        teacher: whether the final exit's logits are needed, once, and so all layers.
        """
        layers = self.layers if teacher else self.layers[: self.reach]
        exits = self.exits.values()
        final = self.head.forward if teacher else 0.0
        return {
            "backbone": sum(layer.forward for layer in layers),
            "exits": sum(exit.below.flop for exit in exits),
            "head": final + sum(exit.head.flop for exit in exits),
        }

    def tuning(self, teacher: bool = False, whole: bool = False) -> list[float]:
        """FLOP per token of each layer with the exit after it, up to the deepest exit.

        teacher: all layers run, for the final exit's logits, which are not in it: every stage with
        exits makes them. whole: layers that do not run are in it, too, with nothing.
        """
        runs = [layer.forward for layer in self.layers[: None if teacher else self.reach]]
        costs = runs + [0.0] * ((len(self.layers) if whole else self.deepest) - len(runs))
        for layer, exit in self.exits.items():
            costs[self._place(layer) - 1] += exit.whole.flop
        return costs

    def decoding(self) -> list[float]:
        """Weights that a token is multiplied with in each layer and in what predicts after it."""
        costs = [layer.weights for layer in self.layers]
        costs[-1] += self.head.weights
        for layer, exit in self.exits.items():
            costs[self._place(layer) - 1] += exit.whole.weights
        return costs


def work(model: Network, length: int = 0, exit_vocab: int = 0, drafts: int = 1) -> Account:
    """What the parts of `model` weigh and do to a token of a text of `length` tokens.

    exit_vocab: how many tokens the exits know; 0: those of their own vocabulary, or all. drafts:
    steps of a draft exit that are tuned.

    A product with P weights is 2·P FLOP forward, 2·P for the gradient of the weights and 2·P for
    that of its input. Frozen layers have only the first; heads that are shared lack the second, and
    what reads hidden states from which no gradient goes on lacks the third. Weights that a
    process has not in memory weigh nothing.
    """
    backbone = model.backbone
    size = backbone.config.vocab_size
    number = len(model.vocabulary.tokens) if model.vocabulary else exit_vocab
    known = (number or size) / size
    attentions = _attentions(backbone, length)
    layers = [
        _part(layer, backbone, attention)
        for layer, attention in zip(backbone.layers, attentions, strict=True)
    ]
    exits = {
        layer: _exit(model.exit(layer), backbone, attentions[-1], known, drafts)
        for layer in model.exit_layers
    }
    return Account(
        layers,
        exits,
        max([*model.exit_layers, *model.sources], default=0),
        _part(backbone.head, backbone),
        _values(backbone.model.get_input_embeddings()),
        backbone.config.tie_word_embeddings,
        backbone.config.hidden_size,
        known,
    )


def draft_cost(
    model: Network, layer: int, gather: Callable[[list[float]], list[list[float]]] | None = None
) -> float:
    """Of the weights that a token is multiplied with at full depth, the share of a draft.

    gather: where several processes have the model's stages, gives what each of them counts.
    """
    account = work(model)
    exit = account.exits[layer].whole.weights if layer in account.exits else 0.0
    own = [*(one.weights for one in account.layers), account.head.weights, exit]
    *weights, head, exit = map(max, zip(*(gather(own) if gather else [own]), strict=True))
    before = weights[:layer] if layer != DRAFT else []
    return (sum(before) + exit) / (sum(weights) + head)


def state_bytes(tokens: float, state: float, exits: int, needs_teacher: bool) -> float:
    """Bytes that so many `exits` need at a time of the hidden states of `tokens`.

    state: bytes of a token's hidden state. One exit has them at a time, but with a loss that needs
    the final exit's logits they wait for the last layer.
    """
    return STATES * (exits if needs_teacher else 1) * tokens * state


def room(exits: Sequence[float]) -> float:
    """Bytes of hidden states up to which all micro-batches go down the layers side by side.

    So that only one exit's gradients exist at a time, where hidden states take less memory than the
    gradients of the other `exits` (bytes of their weights) would; else one after another.
    """
    return sum(exits) - max(exits, default=0)


def runs_side_by_side(states: float, exits: Sequence[float]) -> bool:
    """Whether the micro-batches of a step go side by side; states: bytes of theirs. See `room`."""
    return states <= room(exits)


def _exit(exit: Exit, backbone: Backbone, attention: float, known: float, drafts: int) -> ExitWork:
    """An exit that knows a share of the vocabulary; attention: FLOP of the last layer's.

    drafts: steps of a draft exit, of which the j-th attends to the keys of j steps. Its weights are
    those of a first draft.
    """
    times, steps = {"first": 1, "later": drafts - 1}, 1
    if isinstance(exit, DraftExit):
        steps = drafts
    below = sum(p.numel() for name, p in exit.named_parameters() if _is_below_head(name))
    attentions = (len(exit.segment.layers) if exit.segment else 0) * attention
    attentions *= steps * (steps + 1) // 2
    tuned, split = [], exit.layer_parts()
    unsplit = Work()
    for child, part in exit.named_children():
        keeps = _is_below_head(f"{child}.") and part not in split
        unsplit += Work(values=_values(part)) if keeps else Work()
        for matrix in _matrices(part, backbone) if _is_below_head(f"{child}.") else ():
            # A layer that is run again is frozen: no gradient goes beyond the parts that replace
            # its own.
            gradients = 1 if exit.records_call and matrix.reads_residual else 2
            found = matrix.work(gradients, times.get(child, steps))
            tuned.append(replace(found, weights=0) if child == "later" else found)
            unsplit += found if keeps else Work()
    own = Work(values=below, forward=attentions, backward=2 * attentions)
    shared = exit.output.shared
    head = _part(backbone.head, backbone)
    gradients = (not shared) + (below > 0)
    weights = head.weights * known
    return ExitWork(
        reduce(add, tuned, own),
        Work(
            values=0 if shared else round(head.values * known),
            weights=weights,
            products=steps,
            gradients=steps * gradients,
            width=head.width * known,
            forward=2 * weights * steps,
            backward=2 * weights * steps * gradients,
        ),
        shared,
        unsplit,
    )


def _is_below_head(name: str) -> bool:
    return not name.startswith(("head.", "output."))


def _part(module: nn.Module, backbone: Backbone, attention: float = 0.0) -> Work:
    """A frozen part; attention: FLOP that it takes besides its products."""
    products = [matrix.work() for matrix in _matrices(module, backbone)]
    return reduce(add, products, Work(values=_values(module), forward=attention))


@dataclass(frozen=True)
class _Matrix:
    """A product's weights, of experts those of the active ones.

    width: values that it gives. reads_residual: its input is a hidden state, or a norm of one.
    """

    weights: float
    width: float
    reads_residual: bool

    def work(self, gradients: int = 0, times: int = 1) -> Work:
        """gradients: products of its backward. times: it is multiplied with a token so often."""
        flop, backward = 2.0 * self.weights * times, gradients * times
        return Work(0, self.weights, times, backward, self.width, flop, gradients * flop)


def _matrices(module: nn.Module, backbone: Backbone) -> Iterator[_Matrix]:
    """What a token is multiplied with in a module, whatever the weights are kept in.

    Linear layers tell their sizes; a router and experts have parameters instead: (experts, H), and
    (experts, …) for all experts at once, of which a token takes the router's `top_k`.
    """
    hidden = backbone.config.hidden_size
    active: Any = next((m.top_k for m in module.modules() if hasattr(m, "top_k")), 0)
    for path, part in module.named_modules():
        sizes = _linear_sizes(part)
        if sizes:
            reads = sizes[0] == hidden and not WRITES_BACK & {*path.split(".")}
            yield _Matrix(sizes[0] * sizes[1], sizes[1], reads)
            continue
        for name, p in part.named_parameters(recurse=False):
            if "bias" in name or p.dim() < 2 or isinstance(part, nn.Embedding):
                continue
            share = active / len(p) if p.dim() == 3 else 1.0
            width = active * max(p.shape[1:]) if p.dim() == 3 else len(p)
            yield _Matrix(share * p.numel(), width, False)


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """How many values go in and come out of a linear layer; None for other modules."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(hasattr(module, name) for name in names):
            return tuple(getattr(module, name) for name in names)
    return None


def _values(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _attentions(backbone: Backbone, length: int) -> list[float]:
    """FLOP per token of each layer's attention: products of queries with keys, and with values.

    Half of `length` tokens are before a token, or less where a window slides.
    """
    config = backbone.config
    heads = config.num_attention_heads
    one = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0) or one
    values = getattr(config, "v_head_dim", 0) or one
    windows = [getattr(x, "sliding_window", None) for x in DynamicCache(config=config).layers]
    seen = [_seen(length, window or length) for window in windows]
    return [2.0 * heads * (keys + values) * tokens for tokens in seen]


def _seen(length: int, window: int) -> float:
    """Tokens that a token sees on average."""
    window = min(window, length)
    return window * (1 - window / (2 * length)) if length else 0.0
