"""The forward passes of decoding: prompts whole, then windows of many sequences at a time.

What a pass needs and gives lies in buffers of fixed size, so that it can be compiled for a few
sizes and, on CUDA, captured as a graph. What a segment gives for the tokens of a sequence waits in
the *ring* before the next segment until that one computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.backbone import State
from ee_tuning.devices import sent
from ee_tuning.exit_config import DRAFT, LOOKUP
from ee_tuning.exits import DraftExit, Exit
from ee_tuning.exits.head import Head
from ee_tuning.invariant import Invariant
from ee_tuning.model import Network
from ee_tuning.passes.cache import Place, Rings, SlotCache, make_caches
from ee_tuning.passes.chains import Chains
from ee_tuning.passes.draws import NOTHING, Draws
from ee_tuning.passes.graphs import CHUNK, Graphs, Sizes, compiled
from ee_tuning.passes.sources import Sources, side_by_side
from ee_tuning.passes.straight import Feed, Straight
from ee_tuning.passes.wanted import (
    Predictions,
    Predictor,
    Read,
    Rows,
    Wanted,
    Window,
    newest,
    predict,
    table_of,
    told,
    verified,
)
from ee_tuning.slices import sharing_group


class Passes:
    """The chain of segments with its caches and rings, for up to `slots` sequences at a time.

    Memory is taken once; see `__init__`. No pass keeps any.
    """

    def __init__(
        self,
        model: Network,
        exit_layers: Sequence[int],
        *,
        slots: int,
        capacity: int,
        longest: int,
        compile: bool = False,
        stage: range | None = None,
        cuts: Sequence[int] = (),
    ) -> None:
        """exit_layers, cuts: where the backbone is cut. capacity: tokens of a sequence at most.
        longest: tokens of a window at most. compile: layers and exits, on CUDA with graphs.
        stage: the layers, counted from 0, that this process has; default: all. What comes from
        the stage before is `put` in front of its segments, what goes to the next one `taken`.

        Raises:
            UserError: the K/V do not fit into the memory that is free.
        """
        # Not the model itself: an engine is kept no longer than it.
        self.backbone = model.backbone
        self.device, self.dtype = model.backbone.device, model.backbone.dtype
        self.slots, self.capacity, self.compile = slots, capacity, compile
        self.texts, self.most = LOOKUP in exit_layers, longest
        self.invariant, self.graphs = Invariant(self.backbone, compile), Graphs(self.device)
        kinds = DRAFT in exit_layers or [*exit_layers] == [LOOKUP], not self.invariant.missing
        self.sizes = Sizes(slots, capacity, longest, compile, *kinds)
        self.longest = longest = self.sizes.longest
        most = self.backbone.end or max(capacity, self.backbone.context or 0)
        self.limit = most - 1  # for padding: no position more
        stage = stage or range(self.backbone.num_layers)
        self.is_first, self.is_last = stage.start == 0, stage.stop == self.backbone.num_layers
        self.exits = {k: model.exit(k) for k in exit_layers if k - 1 in stage}
        self.segments = model.segments(list(self.exits), stage.stop, cuts)
        draft = model.draft if DRAFT in exit_layers else None
        self.caches, self.exit_caches = self._make_caches(draft)
        rings = len(self.segments) + (0 if self.is_last else 1)
        hidden = torch.zeros(self.backbone.config.hidden_size, device=self.device, dtype=self.dtype)
        self.rings = Rings(rings, slots, longest, hidden, compile)
        rows = slots, self.sizes.together
        control = torch.zeros(sum(rows), 3 + longest, dtype=torch.int64, device=self.device)
        self.control, self.prompts_control = control.split(rows)
        self.draws = Draws(slots, self.device, compile)
        self._steps = model.segments(list(self.exits), stage.stop, cuts, self.invariant.layer)
        self.invariant.attach(self._steps, self.caches)
        self._final = self.invariant.final()
        kept, positions = self.exit_caches, compile * min(most, self.sizes.places)
        twin = self.invariant.exit
        # These run in place of the exits, but on prompts.
        self._exits = {k: twin(one, kept.get(k), positions) for k, one in self.exits.items()}
        self.predict, self.group = compiled(predict, compile), sharing_group(model, self.device)
        graphs = self.graphs if compile else None
        self.feed = Feed(self.control, self.sizes, graphs, self.invariant)
        if compile:
            self._steps[0].look_up_positions(positions)
        for segment, cache in zip(self._steps, self.caches, strict=True) if compile else ():
            segment.compile(cache, self._steps[0])
        self.keep_positions = self._steps[0].keep_positions
        self._make_chains(model, draft, stage, DRAFT in exit_layers)

    @property
    def branch(self) -> bool:
        """Whether segments can be branches of one graph: with --tp only where what they send goes
        by way of the GPUs' memory, since NCCL cannot be part of a branch."""
        if self.group is not None:
            config, most = self.backbone.config, self.most
            widest = max(config.hidden_size, -(-config.vocab_size // self.group.size))
            return self.graphs.branch and self.group.holds(most * widest)
        return self.graphs.branch

    @torch.inference_mode()
    def prompts(self, given: Mapping[int, Any], last: int, wanted: Wanted) -> Iterator[Read]:
        """Read prompts into empty slots in one pass, neither compiled nor padded; several, if they
        can stand `beside` each other.

        given: by slot, ids, or for a later stage hidden states (P, H). last: the last segment to
        run. What is given is good until the next one is.
        """
        texts = [sent(inputs, self.device) for inputs in given.values()]
        lengths = [len(text) for text in texts]
        padding = 0, self.invariant.padding(sum(lengths)) if self.beside else 0
        places = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        hidden, positions = (F.pad(x, padding)[None] for x in (torch.cat(texts), places))
        slots, beside = sent([*given], self.device), lengths if self.beside else None
        place = Place(slots, positions, max(lengths), in_order=False, empty=True, texts=beside)
        for cache in (*self.caches, *self.exit_caches.values()):
            cache.put(place)
        states = []
        for i, segment in enumerate((self._steps if self.beside else self.segments)[: last + 1]):
            masks = self.caches[i].masks(segment, self.dtype) if self.beside else None
            states.append(segment(hidden, positions, self.caches[i], masks))
            hidden = states[-1].hidden
        parts = [state.split(lengths) for state in states]
        for row, (slot, text) in enumerate(zip(given, texts, strict=True)):
            yield self._read_prompt(slot, text, [one[row] for one in parts], wanted)

    def _read_prompt(
        self, slot: int, text: Tensor, states: Sequence[State], wanted: Wanted
    ) -> Read:
        """What one text (P,) or (P, H) of a pass leaves behind in its slot and is followed by."""
        slots = sent([slot], self.device)
        state, last = states[-1], len(states) - 1
        positions = state.position_ids
        for cache in self.exit_caches.values():
            cache.put(Place(slots, positions, len(text), in_order=False, empty=True))
        for segment, own in zip(self.segments[:last], states[:last], strict=True):
            exit = self.exits.get(segment.stop)
            if exit is not None and exit.segment is not None:
                exit.features(own, self.exit_caches[segment.stop])
        sources = side_by_side(states)
        if self.chains is not None and self.is_first and state.stop == self.backbone.num_layers:
            self.chains.prompt(slots, text[None], positions, sources)
        rows = Rows(slots, positions, positions[:, -1] + 1, self.draws.table)
        exit, kept = self.exits.get(state.stop), self._exit_cache(last)
        found = self.agreed(predict(self._final, exit, state, kept, rows, wanted))
        head, hidden = self._head(last, wanted), None if self.is_last else state.hidden[0]
        predictions = None if found is None else Predictions(*found, [0], head)
        return Read(slot, predictions, 0, hidden, sources)

    @property
    def reads_apart(self) -> bool:
        """Whether prompts can be read in a `Lane` while other passes run: nothing that these write
        or look at is theirs."""
        return self.sizes.apart and self.sizes.of_prompts(CHUNK) and self.group is None

    @property
    def beside(self) -> bool:
        """Whether prompts can be read in one pass, none of which changes a bit of another's."""
        return self.invariant.beside and self.group is None and self.is_first and self.is_last

    @torch.inference_mode()
    def forget(self, slot: int) -> None:
        """Nothing of a slot's text is left: what is hidden from others is multiplied by 0 at last,
        which does not hide what is no number."""
        for cache in (*self.caches, *self.exit_caches.values()):
            cache.forget(slot)
        for one in (self.chains, self.sources):
            if one is not None:
                one.forget(slot)
        self.rings.forget(slot)

    @torch.inference_mode()
    def put(self, slots: Sequence[int], positions: Sequence[int], hidden: Tensor) -> None:
        """What the stage before gave for n tokens, (n, H), is what the first segment computes."""
        self.rings.put(slots, positions, hidden)

    @torch.inference_mode()
    def take(self, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """What the last segment gave for n of the tokens computed last: (n, H)."""
        return self.rings.take(slots, positions)

    @torch.inference_mode()
    def window(
        self, i: int, windows: list[Window], starts: Sequence[int], wanted: Wanted, least: int = 1
    ) -> Predictions | None:
        """Run segment `i` on windows of different sequences.

        starts: for every slot, the position of the first token that the segment has not computed.
        least: tokens that a compiled pass is for, at least.
        """
        given = {window.slot: window for window in windows}
        slots, size = self._sized([*given], max(least, *(one.count for one in windows)), starts)
        self.tell(slots, starts, given, size[1])
        found = self.run((i, *size, wanted))
        if wanted.after == "nothing":
            return None
        places = {slot: row for row, slot in enumerate(slots)}
        rows = [places[window.slot] for window in windows]
        return Predictions(found[0], found[1], rows, self._head(i, wanted))

    def _sized(
        self, slots: list[int], length: int, starts: Sequence[int]
    ) -> tuple[list[int], tuple[int, int, int, bool]]:
        """As `Sizes.sized`, of a pass on windows of so many tokens."""
        slots, first = sorted(slots), max(starts[slot] for slot in slots)
        if self.compile:
            return self.sizes.sized(slots, length, first)
        return slots, (len(slots), length, first + length, slots == [*range(len(slots))])

    @torch.inference_mode()
    def straight(
        self, newest: Mapping[int, int], starts: Sequence[int], wanted: Wanted,
        before: Straight | None = None, known: Collection[int] = (),
    ) -> Straight:  # fmt: skip
        """What goes on with texts that go through the one segment there is.

        newest: by slot, the last token of all texts in progress. starts: as for `window`. before:
        what the device is at; of slots that are `known` it has the token.
        """
        slots, (*_, in_order) = self._sized([*newest], 1, starts)
        where = {} if before is None else before.where
        self.feed.tell(slots, starts, newest, {slot: where[slot] for slot in known})
        reach = max(starts[slot] for slot in slots)
        return Straight(self.feed, self.forward, reach, slots, [*newest], (in_order, wanted))

    def tell(
        self, slots: list[int], starts: Sequence[int], given: Mapping[int, Window], length: int
    ) -> None:
        """Tell the device what the next pass is about."""
        control = self._control(length)[: len(slots), : 3 + length]
        control.copy_(told(table_of(slots, starts, given, length)), non_blocking=True)

    def _control(self, length: int) -> Tensor:
        """What passes are told for windows of a length, (n, 3 + tokens)."""
        alone = self.compile and self.sizes.of_prompts(length)
        return self.prompts_control if alone else self.control

    @torch.inference_mode()
    def verify(
        self, slots: list[int], said: Tensor, starts: Sequence[int], measure: str, samples: int
    ) -> Any:
        """`to_end` of what a chain left and says, (n, 1 + 2k); gives what `verified` does. starts:
        as for `window`."""
        said = said.clone()  # a captured pass may write over it
        _, size = self._sized(slots, 1 + said.shape[1] // 2, starts)
        found = self.to_end(0, size, Wanted("each", True, measure, samples), self.run)
        return verified(said, *found) if self.is_last else None

    def to_end(
        self, first: int, size: tuple[int, int, int, bool], wanted: Wanted,
        run: Callable[[tuple[Any, ...]], Any] | None = None,
    ) -> Any:  # fmt: skip
        """All segments from one on, on windows of a size, as `forward` takes it; gives what the
        last one does. run: each of them; default: `forward`, where all are part of one graph."""
        last, nothing = len(self.segments) - 1, Wanted("nothing", False)
        for i in range(first, last + 1):
            key = i, *size, wanted if i == last and self.is_last else nothing
            found = self.forward(*key) if run is None else run(key)
        return found

    def run(self, key: tuple[Any, ...]) -> Any:
        """`forward` of these arguments, as a graph where there are graphs."""
        if not self.compile:
            return self.forward(*key)
        # So torch's products of one token become reductions, which use more of the bandwidth.
        tune = key[1:3] == (1, 1) and self.invariant.missing is not None
        beside = self.sizes.of_prompts(key[2])
        return self.graphs.run(key, lambda: self.forward(*key), tune, beside)

    def forward(
        self, i: int, rows: int, length: int, reach: int, in_order: bool, wanted: Wanted
    ) -> Any:
        """Segment `i` on the windows that `_control` tells of: for each row slot, first position,
        number of tokens, and before the first segment these; as long as `length` is.

        Gives what `predict` does.
        """
        control = self._control(length)[:rows, : 3 + length]
        slots, counts = control[:, 0], control[:, 2]
        positions, position_ids, waiting = self.rings.begin(control, self.ring(i), self.limit)
        start = reach - length if rows == 1 and in_order and not self.compile else None
        place = Place(slots, positions, reach, in_order, start=start)
        inputs = control[:, 3:] if waiting is None else waiting
        state = self.through(i, inputs, position_ids, place)
        self.rings.keep(i + 1, slots, positions, state.hidden)
        prompts = self.compile and length >= CHUNK and i == len(self._steps) - 1
        if self.chains is not None and prompts:
            # As long as windows of prompts are; of other tokens it is written over later.
            self.chains.read(control, reach, in_order)
        predictor = self.predictor(i, state, place)
        if wanted.after == "nothing" and predictor.cache is None:
            return None
        return self.asked(predictor, Rows(slots, positions, counts, self.draws.table), wanted)

    def asked(
        self, predictor: Predictor, rows: Rows, wanted: Wanted
    ) -> tuple[Tensor, Tensor] | None:
        """What `predict` gives, compiled piece by piece: of few sizes, and tokens are drawn by a
        piece of their own; with --tp the first process's answers."""
        samples, wanted = wanted.samples, replace(wanted, samples=NOTHING)
        last = wanted.after == "last" and rows.positions.shape[1] > 1
        if last and wanted.final and predictor.cache is None:
            predictor, rows = newest(predictor, rows)
        found = self.predict(*predictor, rows, wanted)
        if found is not None and samples:
            exit = None if wanted.final else predictor.exit
            tokens = None if exit is None else exit.output.tokens
            places = rows.places(wanted.after)
            found = found[0], self.draws.draw(*found, rows.slots, places, samples, tokens)
        return self.agreed(found)

    def ring(self, i: int) -> Tensor | None:
        """Where hidden states wait before segment `i`: (slots, ring, H); None before the first."""
        return None if self._steps[i].is_first else self.rings.rings[i]

    def through(self, i: int, inputs: Tensor, position_ids: Tensor, place: Place) -> State:
        """What segment `i` makes of ids (n, T) or hidden states (n, T, H) of tokens at a place."""
        cache = self.caches[i]
        cache.put(place)
        state = self._steps[i](inputs, position_ids, cache, cache.masks(self._steps[i], self.dtype))
        if self.sources is not None:
            self.sources.keep(place.slots, place.positions, state)
        return state

    def predictor(self, i: int, state: State, place: Place, final: bool = False) -> Predictor:
        """What predicts behind segment `i`, from the state there. final: no exit is asked, nor
        kept K/V of."""
        exit = None if final else self._exits.get(state.stop)
        cache = None if final else self._exit_cache(i)
        if cache is not None and exit is not None and exit.segment is not None:
            cache.put(place)
            state = replace(state, boundaries=cache.masks(exit.segment, self.dtype))
        return Predictor(self._final, exit, state, cache)

    def agreed(self, found: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """With --tp, the first process's answers on all: the last bit of a confidence, which may
        depend on the kernels that were chosen, must not part them."""
        if found is None or self.group is None:
            return found
        return found[0], self.group.first(found[1])

    def _head(self, i: int, wanted: Wanted) -> Head | None:
        """Of the exit that predicts behind segment `i`; None: the final one does."""
        exit = None if wanted.final else self.exits.get(self.segments[i].stop)
        return None if exit is None else exit.output

    def _exit_cache(self, i: int) -> SlotCache | None:
        return self.exit_caches.get(self.segments[i].stop)

    def _make_caches(self, draft: Exit | None) -> tuple[list[SlotCache], dict[int, SlotCache]]:
        """Those of the segments, and of the exits that have K/V, with the draft exit."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        if not self.is_first:
            size = (1, 1, self.backbone.config.hidden_size)
            token = torch.zeros(size, dtype=self.dtype, device=self.device)
        sizes = (self.slots, self.sizes.places, self.longest)
        exits = self.exits | ({DRAFT: draft} if draft is not None else {})
        return make_caches(self.segments, exits, token, sizes, self.capacity)

    def _make_chains(
        self, model: Network, draft: DraftExit | None, stage: range, drafts: bool
    ) -> None:
        """What draft exits need: the states that they read, and if one is here its passes."""
        self.sources: Sources | None = None
        self.chains: Chains | None = None
        if not drafts:
            return
        for segment in {*self.segments, *self._steps}:
            segment.keep(model.sources)
        self.sources = Sources(model.sources, stage, self.rings.rings[0], self.compile)
        if draft is not None:
            self.chains = Chains(
                draft, self.invariant, self.exit_caches.pop(DRAFT), self.sizes,
                self.graphs if self.compile else None, self.control, self.draws.table, self.sources,
                self.limit,
            )  # fmt: skip
