"""Losses per prompt: what a threshold changes of texts, measured along them or by writing anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.config import Leaving
from ee_tuning.decode import engines_of, generate_batch
from ee_tuning.decode.arguments import end_tokens
from ee_tuning.decode.engine import Engine
from ee_tuning.decode.settings import Full
from ee_tuning.decode.whole import Text, whole_texts
from ee_tuning.losses import LOGITS, confidence
from ee_tuning.model import Descent, Network
from ee_tuning.parallel.data import collect, collect_stages, deal
from ee_tuning.parallel.mesh import ALONE, Mesh

Thresholds = Mapping[int, float]
OFF = 1.0  # the threshold of an exit at which no token leaves
ROWS = 64  # texts in a pass
NATS = 1.0  # per place, that are as bad as can be


@dataclass(frozen=True)
class Measured:
    """Losses (n,), one per prompt, and the mean layer at which tokens left."""

    losses: np.ndarray
    depth: float


class Risk(Protocol):
    """What thresholds cost."""

    def measure(self, thresholds: Thresholds, prompts: np.ndarray) -> Measured:
        """On the prompts of these numbers."""


# -- the text that full depth writes -------------------------------------------------------------


def full_texts(
    model: Network,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    slots: int,
    compile: bool | None,
    advance: Callable[[int], None],
    mesh: Mesh = ALONE,
) -> list[list[int]]:
    """What greedy decoding at full depth goes on with, up to `new_tokens` and with what ends it.

    advance: told how many tokens were written. mesh: the ranks that share the prompts.
    """
    ends = end_tokens(model.backbone.model)
    capacity = max(map(len, prompts)) + new_tokens
    policy, found = Full(model.backbone.num_layers), {}
    texts = [Text(list(ids), policy, len(ids) + new_tokens, ends=ends) for ids in prompts]
    size: dict[str, Any] = {"slots": slots, "capacity": capacity, "max_pending": 8}
    own = deal(texts, mesh)
    size["drafts"] = mesh.pp > 1
    with engines_of(model).lend(model, [], **size, compile=compile) as engine:
        assert isinstance(engine, Engine)
        # Of about the same length together: a pass looks back as far as its longest text.
        waiting = deque(sorted(own, key=lambda text: len(text.ids)))
        for text, tokens in whole_texts(engine, waiting):
            found[text] = tokens
            advance(len(tokens))
    return collect([found[text] for text in own], mesh)


# -- along that text: what every exit would say at each of its places ----------------------------


@dataclass
class Seen:
    """What E exits say along N texts of at most T places: (N, E, T), without meaning behind a
    text's end.

    right: whether it is the text's token. sure: the confidence. worse: how much less likely the
    text's token is than at full depth, in nats; None if that was not asked for. lengths: (N,).
    """

    layers: list[int]
    depth: int
    right: np.ndarray
    sure: np.ndarray
    worse: np.ndarray | None
    lengths: np.ndarray


@torch.inference_mode()
def look(
    model: Network,
    layers: list[int],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    measure: str,
    likelihoods: bool = False,
    mesh: Mesh = ALONE,
) -> Seen:
    """Ask every exit at each place of `texts`, in one pass: it does not depend on thresholds what
    it says there, since what tokens left behind is computed before anything looks back at it.

    mesh: the ranks that share the texts, in the batches of one process, and the layers.
    """
    lengths = np.array([len(text) for text in texts])
    size = (len(texts), len(layers), int(lengths.max()))
    right, sure = np.zeros(size, dtype=bool), np.zeros(size, dtype=np.float32)
    worse = np.zeros(size, dtype=np.float32) if likelihoods else None
    full = np.zeros((size[0], size[2]), dtype=np.float32) if likelihoods else None
    whole = [[*prompt, *text[:-1]] for prompt, text in zip(prompts, texts, strict=True)]
    order = sorted(range(len(whole)), key=lambda n: len(whole[n]))
    batches = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
    for own in deal(batches, mesh):
        ids = torch.zeros(len(own), len(whole[own[-1]]), dtype=torch.int64)
        for row, number in enumerate(own):
            ids[row, : len(whole[number])] = torch.tensor(whole[number])
        # In the batch, the places that predict each token of the texts; and where that is put.
        rows = np.repeat(np.arange(len(own)), lengths[own])
        places = np.concatenate([np.arange(lengths[n]) for n in own])
        firsts = np.array([len(prompts[n]) - 1 for n in own])
        tokens = torch.tensor([token for n in own for token in texts[n]])
        at = torch.from_numpy(rows), torch.from_numpy(places + firsts[rows])
        to = np.array(own)[rows]
        vocabulary = model.backbone.config.vocab_size
        said_of = partial(_said, tokens=tokens, measure=measure, vocabulary=vocabulary)
        descent = _entered(model, ids, mesh)
        for e, layer in enumerate(layers):
            if layer not in model.exit_layers:  # another stage's
                continue
            exit = model.exit(layer)
            features = exit.features(descent.to(layer))[at]
            said = said_of(exit.logits, features)
            right[to, e, places], sure[to, e, places] = said[0], said[1]
            if worse is not None:
                worse[to, e, places] = said[2]
        if mesh.pp_rank < mesh.pp - 1:
            dist.send(descent.ahead(model.stage.stop).contiguous(), dst=mesh.next_stage)
        elif full is not None:
            hidden = model.backbone.norm(descent.ahead(model.backbone.num_layers)[at])
            full[to, places] = said_of(model.backbone.logits, hidden)[2]
    for values in (right, sure, worse, full):
        if values is not None:
            parts = collect_stages([values[own] for own in deal(batches, mesh)], mesh)
            for own, part in zip(batches, parts, strict=True):
                values[own] = part
    if worse is not None and full is not None:
        worse -= full[:, None]
    return Seen(layers, model.backbone.num_layers, right, sure, worse, lengths)


def _entered(model: Network, ids: Tensor, mesh: Mesh) -> Descent:
    """A batch of tokens (B, T) at the first layer of this stage."""
    device = model.backbone.device
    if not mesh.pp_rank:
        return model.chain.descend(ids.to(device))
    size = *ids.shape, model.backbone.config.hidden_size
    hidden = torch.empty(size, dtype=model.dtype, device=device)
    dist.recv(hidden, src=mesh.previous_stage)
    return model.chain.descend(hidden)


def _said(
    logits_of: Callable[[Tensor], Tensor],
    features: Tensor,
    tokens: Tensor,
    measure: str,
    vocabulary: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of features (M, H): whether `tokens` (M,) are the likeliest, how sure, and nats they cost."""
    found = []
    size = max(1, LOGITS // vocabulary)
    for part, own in zip(features.split(size), tokens.split(size), strict=True):
        logits, own = logits_of(part[None])[0].float(), own.to(part.device)
        nats = logits.logsumexp(-1) - logits.gather(-1, own[:, None])[:, 0]
        right = logits.argmax(-1) == own
        found.append(torch.stack([right.float(), confidence(logits, measure), nats]))
    right, sure, nats = torch.cat(found, dim=1).cpu().numpy()
    return right > 0, sure, nats


class Along:
    """Risks of the text that full depth writes: of another token, or of nats lost.

    One pass over the texts, `Seen`, serves all thresholds. Where another token is taken, the text
    goes on as at full depth, which takes a pass to the end.
    """

    def __init__(self, seen: Seen, max_pending: int) -> None:
        """max_pending: tokens that may leave before one has to go all the way."""
        self.seen, self.max_pending = seen, max_pending

    def measure(self, thresholds: Thresholds, prompts: np.ndarray) -> Measured:
        """See `Risk`."""
        seen, taken = self.seen, self.taken(thresholds, prompts)
        lengths = seen.lengths[prompts]
        there = np.arange(taken.shape[1]) < lengths[:, None]
        layers = np.array([*seen.layers, seen.depth])
        depth = layers[taken][there].mean()
        if seen.worse is None:
            cost = ~self._of(seen.right, taken, prompts, True)
            return Measured((cost & there).sum(1) / lengths, float(depth))
        # Summed in fp64, where infinities of tokens that an exit does not know stay what they are.
        worse = np.where(there, self._of(seen.worse, taken, prompts, 0.0), 0.0).sum(1, dtype=float)
        return Measured(np.clip(worse / lengths / NATS, 0, 1), float(depth))

    def taken(self, thresholds: Thresholds, prompts: np.ndarray) -> np.ndarray:
        """The exit at which each token leaves, (n, T), counted from 0; E at full depth."""
        seen, sure = self.seen, self.seen.sure[prompts]
        bars = np.array([thresholds[layer] for layer in seen.layers], dtype=np.float64)
        leaves = (sure >= bars[:, None]) & (bars < OFF)[:, None]
        n, exits, length = leaves.shape
        first = np.where(leaves.any(1), leaves.argmax(1), exits)
        right = self._of(seen.right, first, prompts, True)
        taken, pending = np.full((n, length), exits), np.zeros(n, dtype=int)
        for place in range(1, length):  # the first token follows the prompt, which goes to the end
            goes = (first[:, place] < exits) & (pending < self.max_pending)
            taken[:, place] = np.where(goes, first[:, place], exits)
            pending = np.where(goes & right[:, place], pending + 1, 0)
        return taken

    @staticmethod
    def _of(values: np.ndarray, taken: np.ndarray, prompts: np.ndarray, full: Any) -> np.ndarray:
        """(N, E, T) at the exits (n, T) where tokens leave; `full` for those that do not."""
        own = values[prompts]
        own = np.concatenate([own, np.full_like(own[:, :1], full)], axis=1)
        return np.take_along_axis(own, taken[:, None], axis=1)[:, 0]


# -- writing anew --------------------------------------------------------------------------------


class Free:
    """The risk of a place of the free text to have another token than at full depth.

    Each call writes all of its texts, so this takes long.
    """

    def __init__(
        self,
        model: Network,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        leaving: Leaving,
        new_tokens: int,
        slots: int,
        compile: bool | None,
        mesh: Mesh = ALONE,
    ) -> None:
        """texts: of full depth. leaving: without the threshold. mesh: as for `full_texts`."""
        self.mesh = mesh
        self.model, self.prompts, self.texts, self.leaving = model, prompts, texts, leaving
        self.how: dict[str, Any] = {"slots": slots, "compile": compile}
        self.how |= {"max_new_tokens": new_tokens, "do_sample": False}
        self.how["capacity"] = max(map(len, prompts)) + new_tokens

    def measure(self, thresholds: Thresholds, prompts: np.ndarray) -> Measured:
        """See `Risk`."""
        leaving = replace(self.leaving, threshold=dict(thresholds))
        numbers = deal(prompts.tolist(), self.mesh)
        found: dict[int, tuple[float, list[int]]] = {}
        ids = [self.prompts[number] for number in numbers]
        for row, out in generate_batch(self.model, ids, leaving, **self.how):
            assert out.sequences is not None
            assert out.exit_layers is not None
            full, new = self.texts[numbers[row]], out.exit_layers.shape[1]
            own = out.sequences[0, -new:].tolist()
            same = sum(a == b for a, b in zip(own, full, strict=False))
            found[row] = 1 - same / max(len(own), len(full)), out.exit_layers[0].tolist()
        both = collect([found[row] for row in range(len(numbers))], self.mesh)
        depths = [depth for _, own in both for depth in own]
        return Measured(np.array([loss for loss, _ in both]), float(np.mean(depths)))
