"""The forward passes of decoding: prompts whole, then windows of many sequences at a time.

What a pass needs and gives lies in buffers of fixed size, so that it can be compiled for a few
sizes and, on CUDA, captured as a graph. What a segment gives for the tokens of a sequence waits in
the *ring* before the next segment until that one computes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ee_tuning.backbone import Segment, State
from ee_tuning.decode.cache import Place, SlotCache, SlotLayer, check_room
from ee_tuning.exits import Exit
from ee_tuning.losses import confidence

if TYPE_CHECKING:
    from ee_tuning.model import EarlyExitModel

VERSIONS = 256  # compiled versions that a layer may have, one per size of a pass
# Sizes that are compiled for: so many times the last one, from 1 row, 1 token and so many places.
ROWS_FACTOR = LENGTH_FACTOR = 4
REACH_FACTOR, LEAST_REACH = 2, 256
CHUNK, CHUNKS = 64, 4  # prompts of so many chunks at most are read as windows, if compiled
ALIGNED = 64  # places that there are is a multiple of this, as fast attention wants it


@dataclass
class Window:
    """Tokens of one sequence that a segment computes at once: its next `count` ones.

    ids: the tokens, where the segment is the first.
    """

    slot: int
    count: int
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class Wanted:
    """What a pass is to predict.

    after: ``nothing``, ``last`` (what follows the last token of each window) or ``each``.
    final: by the final exit, not by the one that may sit at the same layer. measure: of
    confidence, see `ee_tuning.losses.confidence`.
    """

    after: str
    final: bool
    measure: str = "probability"


@dataclass
class Predictions:
    """What follows the tokens of windows: after the last of each (A = 1), or after each.

    logits: (n, A, V) fp32, good until the next pass. tokens, confidences: the likeliest token and
    how sure, by row of `logits`, then token. rows: the row of each window.
    """

    logits: Tensor
    tokens: list[list[float]]
    confidences: list[list[float]]
    rows: list[int]

    def of(self, window: int, place: int) -> Prediction:
        """What follows one token of a window; its last one, if that is all there is."""
        row = self.rows[window]
        place = min(place, len(self.tokens[row]) - 1)
        token, confidence = int(self.tokens[row][place]), self.confidences[row][place]
        return Prediction(token, confidence, self, row, place)


@dataclass
class Prediction:
    """What follows a token: the likeliest one, how sure, and on demand all logits."""

    token: int
    confidence: float
    _all: Predictions
    _row: int
    _place: int

    @property
    def logits(self) -> Tensor:
        """(V,) fp32, good until the next pass."""
        return self._all.logits[self._row, self._place]


@dataclass
class Read:
    """A prompt that was read into `slot`: what follows, if that was wanted, as window `window` of
    `found`; and where a stage follows, the hidden states (P, H) behind the last segment.

    `found` and `hidden` are good until the next pass.
    """

    slot: int
    found: Predictions | None
    window: int
    hidden: Tensor | None


class Passes:
    """The chain of segments with its caches and rings, for up to `slots` sequences at a time.

    Memory is taken once; see `__init__`. No pass keeps any.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        exit_layers: Sequence[int],
        *,
        slots: int,
        capacity: int,
        longest: int,
        compile: bool = False,
        stage: range | None = None,
    ) -> None:
        """exit_layers: where the backbone is cut. capacity: tokens of a sequence at most.
        longest: tokens of a window at most. compile: layers and exits, on CUDA with graphs.
        stage: the layers, counted from 0, that this process has; default: all. What comes from
        the stage before is `put` in front of its segments, what goes to the next one `taken`.

        Raises:
            UserError: the K/V do not fit into the memory that is free.
        """
        self.model, self.slots, self.compile = model, slots, compile
        self.device = model.backbone.device
        self.capacity = capacity
        self.window_sizes = _sizes(longest, LENGTH_FACTOR)
        self.length_sizes = sorted({*self.window_sizes, CHUNK})
        self.longest = longest = self.length_sizes[-1] if compile else longest
        # Windows may be padded beyond the last token.
        self.places = -(-(capacity + longest) // ALIGNED) * ALIGNED
        self.row_sizes = _sizes(slots, ROWS_FACTOR)
        self.reach_sizes = _sizes(self.places, REACH_FACTOR, LEAST_REACH)
        most = model.backbone.end or max(capacity, model.backbone.context or 0)
        self.limit = most - 1  # for padding: no position more
        stage = range(model.backbone.num_layers) if stage is None else stage
        self.is_first, self.is_last = stage.start == 0, stage.stop == model.backbone.num_layers
        self.exits = {k: model.exit(k) for k in exit_layers if k - 1 in stage}
        self.segments = model.segments(list(self.exits), last=stage.stop)
        self._make_caches()
        like: dict[str, Any] = {"device": self.device, "dtype": model.backbone.dtype}
        size = (slots, 2 * longest, model.backbone.config.hidden_size)
        # One before each segment, and behind the last one where a stage follows.
        rings = len(self.segments) + (0 if self.is_last else 1)
        self._rings = [torch.zeros(size, **like) for _ in range(rings)]
        self._control = torch.zeros(slots, 3 + self.longest, dtype=torch.int64, device=self.device)
        self._steps, self._predict = self.segments, _predict
        self._graphs: dict[Any, Any] = {}
        if compile:
            self._steps = model.segments(list(self.exits), last=stage.stop)
            for segment, cache in zip(self._steps, self.caches, strict=True):
                segment.compile(cache)
            self._predict = torch.compile(_predict, dynamic=False)

    @torch.inference_mode()
    def prompts(
        self,
        given: Mapping[int, Sequence[int] | Tensor],
        last: int,
        wanted: Wanted,
        starts: Callable[[int], list[int]],
    ) -> Iterator[Read]:
        """Read prompts into empty slots, through segment `last`; in the order in which they end.

        given: by slot, ids or for a later stage hidden states (P, H). starts: of a segment, as for
        `window`, whatever it says of these slots.
        """
        short = {}
        for slot, inputs in given.items():
            if self.compile and len(inputs) <= CHUNK * CHUNKS:
                short[slot] = inputs
            else:
                yield self._prompt(slot, inputs, last, wanted)
        yield from self._prompts_in_chunks(short, last, wanted, starts)

    def _prompt(self, slot: int, inputs: Sequence[int] | Tensor, last: int, wanted: Wanted) -> Read:
        """A prompt in one pass, neither compiled nor padded."""
        hidden = torch.as_tensor(inputs, device=self.device)[None]
        positions = torch.arange(len(inputs), device=self.device)[None]
        slots = torch.tensor([slot], device=self.device)
        self._put(Place(slots, positions, len(inputs), in_order=False, empty=True))
        for i, segment in enumerate(self.segments[: last + 1]):
            state = segment(hidden, positions, self.caches[i])
            hidden, exit = state.hidden, self.exits.get(segment.stop)
            if exit is not None and exit.segment is not None and i < last:
                exit.features(state, self.exit_caches[segment.stop])
        count = torch.tensor([len(inputs)], device=self.device)
        found = _predict(self.model, exit, state, self._exit_cache(last), count, wanted)
        predictions = None if found is None else _read(*found, [0])
        return Read(slot, predictions, 0, None if self.is_last else hidden[0])

    def _prompts_in_chunks(
        self,
        given: Mapping[int, Sequence[int] | Tensor],
        last: int,
        wanted: Wanted,
        starts: Callable[[int], list[int]],
    ) -> Iterator[Read]:
        """Prompts by compiled passes, together: where launching takes longer than computing."""
        hidden: dict[int, list[Tensor]] = {slot: [] for slot in given}
        first = 0
        while left := [slot for slot in given if len(given[slot]) > first]:
            chunks = [given[slot][first : first + CHUNK] for slot in left]
            ends = [slot for slot in left if len(given[slot]) <= first + CHUNK]
            if not self.is_first:
                self.put(*_places(left, chunks, first), torch.cat(chunks))  # type: ignore[arg-type]
            for i in range(last + 1):
                ids = i == 0 and self.is_first
                windows = [
                    Window(slot, len(chunk), chunk if ids else ())  # type: ignore[arg-type]
                    for slot, chunk in zip(left, chunks, strict=True)
                ]
                known = starts(i)
                for slot in left:
                    known[slot] = first
                asked = wanted if i == last and ends else Wanted("nothing", False)
                found = self.window(i, windows, known, asked)
            if not self.is_last:
                taken = self.take(*_places(left, chunks, first)).split(list(map(len, chunks)))
                for slot, states in zip(left, taken, strict=True):
                    hidden[slot].append(states)
            for slot in ends:
                states = None if self.is_last else torch.cat(hidden[slot])
                yield Read(slot, found, left.index(slot), states)
            first += CHUNK

    @torch.inference_mode()
    def put(self, slots: Sequence[int], positions: Sequence[int], hidden: Tensor) -> None:
        """What the stage before gave for n tokens, (n, H), is what the first segment computes."""
        self._rings[0][self._in_ring(slots, positions)] = hidden

    @torch.inference_mode()
    def take(self, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """What the last segment gave for n of the tokens computed last: (n, H)."""
        return self._rings[-1][self._in_ring(slots, positions)]

    @torch.inference_mode()
    def window(
        self, i: int, windows: list[Window], starts: Sequence[int], wanted: Wanted
    ) -> Predictions | None:
        """Run segment `i` on windows of different sequences.

        starts: for every slot, the position of the first token that the segment has not computed.
        """
        given = {window.slot: window for window in windows}
        slots = self._filled(list(given))
        length = self._size(max(window.count for window in windows), self.length_sizes)
        reach = self._size(max(starts[slot] for slot in slots) + length, self.reach_sizes)
        table = [[slot, starts[slot], 0] for slot in slots]
        for row in table:
            window = given.get(row[0], Window(0, 0))
            row[2] = window.count
            row += [*window.ids, *[0] * (length - len(window.ids))]
        self._control[: len(slots), : 3 + length].copy_(torch.tensor(table), non_blocking=True)
        in_order = self._in_order(slots)
        found = self._run((i, len(slots), length, reach, in_order, wanted))
        if wanted.after == "nothing":
            return None
        logits, answers = found
        return _read(logits, answers, [slots.index(window.slot) for window in windows])

    def _in_ring(self, slots: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        table = [list(slots), list(positions)]
        places = torch.tensor(table, dtype=torch.int64, device=self.device)
        return places[0], places[1] % (2 * self.longest)

    @torch.inference_mode()
    def warm_up(self, measures: Sequence[str] = ("probability",)) -> float:
        """Compile, and capture on CUDA, what decoding with all slots free will ask for.

        A sequence must not be in progress. Gives the seconds it took, 0 where nothing compiles.
        """
        if not self.compile:
            return 0.0
        start = time.perf_counter()
        self._control.zero_()
        self._control[:, 0] = torch.arange(self.slots, device=self.device)
        sizes = product(range(len(self._steps)), self.row_sizes, self.reach_sizes, measures)
        for i, rows, reach, measure in sizes:
            last = self.is_last and i == len(self._steps) - 1
            in_order = self._in_order(list(range(rows)))
            # Of prompts, and before the first segment there is one token otherwise.
            many = [1] if i == 0 and self.is_first else self.window_sizes
            for length in sorted({*many, CHUNK}):
                for after in ("last", "nothing", "each") if last else ("last", "nothing"):
                    wanted = Wanted(after, last and after != "nothing", measure)
                    self._run((i, rows, length, reach, in_order, wanted))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # -- one pass ------------------------------------------------------------------------------

    def _run(self, key: tuple[Any, ...]) -> Any:
        """`_forward` of these arguments, as a graph where there are graphs."""
        if not self.compile:
            return self._forward(*key)
        if key not in self._graphs:
            # So products of one token become reductions, which use more of the memory's bandwidth.
            # For more tokens it takes long to compile and gains little.
            single = key[1:3] == (1, 1)
            with (
                torch._dynamo.config.patch(recompile_limit=VERSIONS),
                torch._inductor.config.patch(coordinate_descent_tuning=single),
            ):
                self._graphs[key] = self._captured(lambda: self._forward(*key))
        return self._graphs[key]()

    def _captured(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """`function` as a CUDA graph that gives the same tensors each time; as it is elsewhere.

        It is run before: compiled code compiles then. Running a pass twice changes nothing.
        """
        function()
        if self.device.type != "cuda":
            return function
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do, as NCCL's, is no part of it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            found = function()

        def replay() -> Any:
            graph.replay()
            return found

        return replay

    def _forward(
        self, i: int, rows: int, length: int, reach: int, in_order: bool, wanted: Wanted
    ) -> Any:
        control = self._control[:rows, : 3 + length]
        slots, starts, counts = control[:, 0], control[:, 1], control[:, 2]
        positions = starts[:, None] + torch.arange(length, device=self.device)
        known = rows == 1 and in_order and not self.compile
        start = reach - length if known else None
        self._put(Place(slots, positions, reach, in_order, start=start))
        ring = slots[:, None], positions % (2 * self.longest)
        segment = self._steps[i]
        inputs = control[:, 3:] if segment.is_first else self._rings[i][ring]
        masks = self._masks(segment, self.caches[i])
        position_ids = positions.clamp(max=self.limit)
        state = segment(inputs, position_ids, self.caches[i], masks)
        if i + 1 < len(self._rings):
            self._rings[i + 1][ring] = state.hidden
        exit, cache = self.exits.get(segment.stop), self._exit_cache(i)
        if cache is not None and exit is not None and exit.segment is not None:
            state = replace(state, boundaries=self._masks(exit.segment, cache))
        if wanted.after == "nothing" and cache is None:
            return None
        return self._predict(self.model, exit, state, cache, counts, wanted)

    def _masks(self, segment: Segment, cache: SlotCache) -> Any:
        if not any(layer.hides for layer in cache.slot_layers):
            return None
        return segment.masks(lambda j: cache.slot_layers[j].mask(self.model.backbone.dtype))

    def _exit_cache(self, i: int) -> SlotCache | None:
        return self.exit_caches.get(self.segments[i].stop)

    def _put(self, place: Place) -> None:
        for cache in (*self.caches, *self.exit_caches.values()):
            cache.put(place)

    # -- sizes ---------------------------------------------------------------------------------

    def _size(self, number: int, sizes: list[int]) -> int:
        """`number`, or where passes are compiled the next one of `sizes`."""
        return next(size for size in sizes if size >= number) if self.compile else number

    def _in_order(self, slots: list[int]) -> bool:
        """Whether the K/V of `slots` can be looked at where they are.

        Compiled, only if they are all: each case is one more graph.
        """
        whole = not self.compile or len(slots) == self.slots
        return whole and slots == list(range(len(slots)))

    def _filled(self, slots: list[int]) -> list[int]:
        """`slots` and as many idle ones as make it a size that is compiled for, ascending.

        What is written for idle slots lies beyond what is known of them.
        """
        number = self._size(len(slots), self.row_sizes)
        idle = [slot for slot in range(self.slots) if slot not in slots]
        return sorted([*slots, *idle[: number - len(slots)]])

    @torch.inference_mode()
    def _make_caches(self) -> None:
        """Caches as large as K/V of one token, which the model is asked for, tell."""
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        blocks = {k: exit.segment for k, exit in self.exits.items() if exit.segment is not None}
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        place, hidden = Place(token[0], token, 1, in_order=True, empty=True), token
        if not self.is_first:
            size = (1, 1, self.model.backbone.config.hidden_size)
            hidden = torch.zeros(size, dtype=self.model.backbone.dtype, device=self.device)
        sample = [self._cache(s, 1, 1, 1, place) for s in self.segments]
        samples = {k: self._cache(block, 1, 1, 1, place) for k, block in blocks.items()}
        for segment, cache in zip(self.segments, sample, strict=True):
            state = segment(hidden, place.positions, cache)
            hidden = state.hidden
            if segment.stop in blocks:
                self.exits[segment.stop].features(state, samples[segment.stop])
        sizes = (self.slots, self.places, self.longest)
        self.caches = [self._cache(segment, *sizes) for segment in self.segments]
        self.exit_caches = {k: self._cache(block, *sizes) for k, block in blocks.items()}
        pairs = [
            (small, large)
            for a, b in zip(
                [*sample, *samples.values()],
                [*self.caches, *self.exit_caches.values()],
                strict=True,
            )
            for small, large in zip(a.slot_layers, b.slot_layers, strict=True)
        ]
        check_room(pairs, self.device)
        for small, large in pairs:
            large.make_like(small)

    def _cache(
        self, segment: Segment, slots: int, capacity: int, longest: int, place: Place | None = None
    ) -> SlotCache:
        layers = [SlotLayer(window, slots, capacity, longest) for window in segment.windows()]
        cache = SlotCache(layers, segment.start, self.capacity)
        if place:
            cache.put(place)
        return cache


def _places(
    slots: Sequence[int], chunks: Sequence[Sequence[int] | Tensor], first: int
) -> tuple[list[int], list[int]]:
    """The slot and the position of every token of chunks that begin at position `first`."""
    each = [slot for slot, chunk in zip(slots, chunks, strict=True) for _ in chunk]
    return each, [first + place for chunk in chunks for place in range(len(chunk))]


def _sizes(most: int, factor: int, least: int = 1) -> list[int]:
    """`least`, `factor` times that, … up to `most`, which comes last."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= factor
    return [*sizes, most]


def _predict(
    model: EarlyExitModel,
    exit: Exit | None,
    state: State,
    cache: SlotCache | None,
    counts: Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor] | None:
    """logits (n, A, V), and (2, n, A): the likeliest tokens (exact in fp32 up to 2²⁴) and the
    confidence in them.

    counts: (n,), the tokens of each window. A `layer` exit keeps its K/V of all of them, whatever
    is wanted.
    """
    features = state.hidden
    if exit is not None and (cache is not None or not wanted.final):
        features = exit.features(state, cache)
    if wanted.after == "nothing":
        return None
    features = model.backbone.norm(state.hidden) if wanted.final else features
    if wanted.after == "last":
        rows = torch.arange(len(counts), device=counts.device)
        features = features[rows, (counts - 1).clamp(min=0)][:, None]
    head = model.backbone if wanted.final else exit
    logits = head.logits(features).float()  # type: ignore[union-attr]
    return logits, torch.stack([logits.argmax(-1).float(), confidence(logits, wanted.measure)])


def _read(logits: Tensor, answers: Tensor, rows: list[int]) -> Predictions:
    """The one wait for the device in a pass."""
    tokens, confidences = answers.tolist()
    return Predictions(logits, tokens, confidences, rows)
