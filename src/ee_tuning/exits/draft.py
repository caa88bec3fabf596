"""The draft exit: one layer that goes on from where the last full pass ended.

The arrangement of EAGLE-3 (arXiv 2503.01840), with a map of its own for the first draft of a chain,
which knows what the backbone made of the token before the newest, x_t: its states y after a few
*source* layers. Later drafts go on from the exit's own output, h::

    h_t = Block(F[N_e(E[x_t]); N_1(y¹_t-1); N_2(y²_t-1); …])                `first_step`
    h_t = Block(G[N_e(E[x_t]); N_h(h_t-1)])                                 `later_step`
    x_t+1 ~ W·N(h_t)

E is the backbone's embedding, N are norms and F, G linear maps. The token that begins a text has
zeros before it. The block has K/V of its own: of settled tokens those of a first step, of a chain's
later tokens those of later steps.

It is tuned with its steps unrolled as decoding runs them: from every token a chain of drafts
begins, of which step j stands at the place of the token j − 1 places on and sees the settled tokens
up to the chain's first one, and the chain itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ee_tuning.backbone import Backbone, Segment, State
from ee_tuning.errors import UserError
from ee_tuning.exit_config import ExitSpec
from ee_tuning.exits.archs import Change, NormExit, as_it_is, trainable
from ee_tuning.losses import IGNORED


class DraftExit(NormExit):
    """Drafts the tokens that follow a settled one; see the head of this file.

    sources: the layers whose states it reads. steps, decay: how many drafts of a chain are tuned,
    and by what the weight of each is less than that of the one before.

    It begins as the backbone's last layer, run once more on the normalised state after the highest
    source at the token before, then on its own output, each with the normalised token added: the
    maps let nothing else through. (Nothing but zeros at a text's first token would have gradients
    that grow with the number of norms.)
    """

    segment: Segment
    # Whether tokens look back at the first one of their text, of which no state is before it.
    sees_first = True

    def __init__(self, backbone: Backbone, spec: ExitSpec) -> None:
        """See `Exit`."""
        super().__init__(backbone, spec)
        self.sources = spec.sources
        self.steps, self.decay = 1, 1.0
        self._make_maps(backbone)
        self.embedding = backbone.embedding()

    def _make_maps(self, backbone: Backbone) -> None:
        """What makes one state of all, and the block that reads it."""
        hidden = backbone.config.hidden_size
        norms = [trainable(backbone.norm) for _ in range(len(self.sources) + 2)]
        for norm in norms:
            self._init_weights(norm)
        self.embed_norm, self.chain_norm, *rest = norms
        self.source_norms = nn.ModuleList(rest)
        self.first = _passing(1 + len(self.sources), hidden, backbone)
        self.later = _passing(2, hidden, backbone)
        self.block = trainable(backbone.layers[-1])
        self._connect(backbone)

    def _connect(self, backbone: Backbone, change: Change = as_it_is) -> None:
        self.segment = backbone.block(change(self.block))

    def layer_parts(self) -> list[nn.Module]:
        """The block."""
        return [self.block]

    def as_layers(self, layers: list[nn.Module]) -> list[nn.Module]:
        """Refused.

        Raises:
            UserError: always.
        """
        raise UserError(
            "a draft exit is no model of its own: it reads what the whole backbone made of the "
            "text; export a norm, mlp or layer exit, or --merge"
        )

    def first_step(
        self,
        ids: Tensor,
        states: Tensor,
        position_ids: Tensor,
        cache: Cache | None = None,
        boundaries: Any = None,
    ) -> Tensor:
        """The first draft after tokens (B, T): h (B, T, H); ``logits(norm(h))`` predict the next.

        states: after the sources, side by side, at the token before each: (B, T, n·H). cache,
        boundaries: as a `Segment` takes them; the block stands where the last layer stands.
        """
        joined = self._joined_first(ids, states, position_ids)
        return self._run(joined, position_ids, cache, boundaries)

    def first_input(self, ids: Tensor, states: Tensor, position_ids: Tensor) -> Tensor:
        """What `first` reads: (B, T, (1 + n)·H)."""
        parts = states.chunk(len(self.sources), dim=-1)
        normed = [norm(part) for norm, part in zip(self.source_norms, parts, strict=True)]
        return torch.cat([self._tokens(ids, position_ids), *normed], dim=-1)

    def later_step(
        self,
        ids: Tensor,
        h: Tensor,
        position_ids: Tensor,
        cache: Cache | None = None,
        boundaries: Any = None,
    ) -> Tensor:
        """A later draft of a chain, from h (B, T, H) of the token before; else as `first_step`."""
        joined = self._joined_later(ids, h, position_ids)
        return self._run(joined, position_ids, cache, boundaries)

    def later_input(self, ids: Tensor, h: Tensor, position_ids: Tensor) -> Tensor:
        """What `later` reads: (B, T, 2·H)."""
        return torch.cat([self._tokens(ids, position_ids), self.chain_norm(h)], dim=-1)

    def _joined_first(self, ids: Tensor, states: Tensor, position_ids: Tensor) -> Tensor:
        """What the block reads for a first draft."""
        return self.first(self.first_input(ids, states, position_ids))

    def _joined_later(self, ids: Tensor, h: Tensor, position_ids: Tensor) -> Tensor:
        """What the block reads for a later one."""
        return self.later(self.later_input(ids, h, position_ids))

    def _run(
        self, joined: Tensor, position_ids: Tensor, cache: Cache | None, boundaries: Any
    ) -> Tensor:
        """The block's output: h (B, T, H)."""
        return self.segment(joined, position_ids, cache, boundaries).hidden

    def _tokens(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.embed_norm(self._embedded(ids, position_ids))

    @torch.no_grad()
    def _embedded(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        # Any mask: no layer looks at it there, and the trunk makes none of its own.
        mask = torch.empty(1, 1, 1, 0, dtype=torch.int32, device=ids.device)
        return self.embedding(ids, position_ids, boundaries=mask).hidden

    def hidden(self, state: State, cache: Cache | None) -> Tensor:
        """The first draft's output at every token."""
        states = before(self._read(state), state.position_ids)
        assert state.ids is not None
        return self.first_step(state.ids, states, state.position_ids, cache, state.boundaries)

    def predictions(self, state: State) -> list[Tensor]:
        """Features (B, T, H) of each draft of the chains that begin at every token.

        Each at the place of its newest token: those of step j at place t belong to the chain that
        began at t − j + 1, and are meaningless where that is before the text's beginning.
        """
        assert self.norm is not None
        found = [self.norm(h) for h in self._unrolled(state, self.steps)]
        return found if self.sequence is None else [self.sequence.shared(h) for h in found]

    def _read(self, state: State) -> Tensor:
        """The states of all positions after the sources, side by side, (B, T, n·H)."""
        states = torch.cat(state.sources, dim=-1)
        return states if self.sequence is None else self.sequence.gather(states)

    def _unrolled(self, state: State, steps: int) -> list[Tensor]:
        """The output (B, T, H) of each of so many steps."""
        assert state.ids is not None
        chains = _Chains(self, state)
        h, found = self._read(state), []
        for step in range(steps):
            advance = self.later_step if step else self.first_step
            last = before(h, state.position_ids)
            h = advance(state.ids, last, state.position_ids, chains.cache, chains.mask(step))
            found.append(h)
        return found

    def targets(self, labels: Tensor, state: State) -> list[tuple[Tensor, float]]:
        """The labels of places where a chain is, and the shares, which add up to 1.

        No chain begins at a first token that no other sees: the exit is never asked there.
        """
        weights = [self.decay**step for step in range(self.steps)]
        # The label of a place's prediction is one place on.
        earlier = F.pad(_place(state.position_ids)[:, :-1], (1, 0))
        least = 0 if self.sees_first else 1
        return [
            (labels.masked_fill(earlier < step + least, IGNORED), weight / sum(weights))
            for step, weight in enumerate(weights)
        ]


def before(values: Tensor, position_ids: Tensor) -> Tensor:
    """At each token the values (B, T, H) of the one before it in its text; zeros at the first."""
    shifted = F.pad(values[:, :-1], (0, 0, 1, 0))
    return shifted.masked_fill(_place(position_ids).eq(0).unsqueeze(-1), 0)


def _begins(position_ids: Tensor) -> Tensor:
    """Where positions (B, T) do not go on by one: the first tokens of texts, (B, T) bool."""
    return F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)


def _place(position_ids: Tensor) -> Tensor:
    """How many tokens of its text are before each token: (B, T) int64."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    return index - torch.where(_begins(position_ids), index, 0).cummax(-1).values


def _passing(number: int, hidden: int, backbone: Backbone) -> nn.Linear:
    """A map of `number` states, (…, number·H) → (…, H), that adds the first and the last."""
    kind: dict[str, Any] = {"device": backbone.device, "dtype": backbone.dtype}
    linear = nn.Linear(number * hidden, hidden, bias=False, **kind)
    with torch.no_grad():
        linear.weight.zero_()
        for part in (linear.weight[:, :hidden], linear.weight[:, -hidden:]):
            part.fill_diagonal_(1)
    return linear


class _Chains:
    """What the steps of all chains see: keys of step after step, each at the places of a text.

    cache: for the block, gathers K/V of the steps done.
    """

    def __init__(self, exit: DraftExit, state: State) -> None:
        self._exit, self._state = exit, state
        self._window = exit.segment.windows()[0]
        self.cache = _StepCache(_Steps())

    def mask(self, step: int) -> Any:
        """What a step (from 0) sees, as the block is told it.

        Of the first step's keys those up to the chain's first token, and of each later step's the
        one of the same chain.
        """
        if step == 0 and self._state.boundaries is not None and self._exit.sees_first:
            return self._state.boundaries
        positions = self._state.position_ids
        text = _begins(positions).cumsum(-1)
        index = torch.arange(positions.shape[1], device=positions.device)
        age = index[:, None] - index
        near = age < (self._window or len(index))
        settled = near & (age >= step)
        if not self._exit.sees_first:
            settled = settled & ((_place(positions) > 0)[:, None] | (age == 0))
        chain = [near & (age == step - k) for k in range(1, step + 1)]
        same = text[:, :, None] == text[:, None]
        hidden = ~torch.cat([same & one for one in (settled, *chain)], dim=-1)[:, None]
        dtype = self._exit.first.weight.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        mask.masked_fill_(hidden, torch.finfo(dtype).min)
        return self._exit.segment.masks(lambda _: mask)


class _Steps(CacheLayerMixin):
    """K/V of one layer in step after step, side by side: (B, heads, steps · T, head dim)."""

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.key_steps: list[Tensor] = []
        self.value_steps: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to make room for."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Add a step's K/V (B, heads, T, head dim); gives those of all steps."""
        found = []
        for steps, new in ((self.key_steps, key_states), (self.value_steps, value_states)):
            steps.append(new)
            found.append(torch.cat(steps, dim=2))
        return tuple(found)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of no use: masks are given."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Of no use: positions are given."""
        return 0

    def get_max_length(self) -> int:
        """Without bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13


class _StepCache(Cache):
    """`_Steps` of the one layer there is, whatever its number."""

    def __init__(self, steps: _Steps) -> None:
        super().__init__(layers=[steps])
        self.steps = steps

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """As `_Steps.update`."""
        return self.steps.update(key_states, value_states)
