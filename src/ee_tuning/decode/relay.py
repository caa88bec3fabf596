"""Passes over the stages of several processes, of which one works at a time.

For modes in which drafts wait for what the last stage says of those before them. Every process runs
the same engine, on the same requests, in step: a segment is computed by the stage that has it, what
it gives for its last layer moves on to the next stage, and all are told what it predicts, so they
decide alike. A draft exit is at the last stage: states after its source layers move along with
those, and all are told its drafts. Nothing overlaps; a process needs the memory of its stage alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.mesh import Mesh
from ee_tuning.passes.chains import Link, filled
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.wanted import Predictions, Read, Wanted, Window


class Part(NamedTuple):
    """A segment: its layers, counted from 0, and which one of which stage it is."""

    start: int
    stop: int
    stage: int
    number: int


class Relay:
    """`Passes` of all stages, as far as an engine that drafts by its exits needs them.

    segments: of all stages, one after another; each stage ends one.
    """

    branch = beside = False
    is_first = is_last = True

    def __init__(self, own: Passes, mesh: Mesh) -> None:
        """own: this stage's. Every process makes one."""
        self.own, self.mesh = own, mesh
        # Ranks that share passes plan the same, whatever the time: see `Sequences.clock`.
        self.group = mesh
        self.slots, self.compile, self.sizes = own.slots, own.compile, own.sizes
        self.capacity, self.longest, self.most = own.capacity, own.longest, own.most
        self.draws, self.graphs, self.device = own.draws, own.graphs, own.device
        spans = [(segment.start, segment.stop) for segment in own.segments]
        found: dict[int, list[tuple[int, int]]] = {}
        for stage, one in mesh.gather_on_host((mesh.pp_rank, spans)):
            found[stage] = one
        self.segments = [
            Part(*span, stage, number)
            for stage in sorted(found)
            for number, span in enumerate(found[stage])
        ]
        self.chains = None if own.sources is None else RelayedChains(self)

    def prompts(self, given: Mapping[int, Any], last: int, wanted: Wanted) -> Iterator[Read]:
        """As of passes, one text after another."""
        end = self.segments[last]
        for slot, text in given.items():
            inputs, read, sources = text, None, None
            for stage in range(end.stage + 1):
                if stage == self.mesh.pp_rank:
                    asked = wanted if stage == end.stage else Wanted("nothing", False)
                    number = end.number if stage == end.stage else len(self.own.segments) - 1
                    (read,) = self.own.prompts({slot: inputs}, number, asked)
                    sources = _beside(sources, None if read.sources is None else read.sources[0])
                if stage < end.stage:
                    own = None if read is None else _beside(read.hidden, sources)
                    moved = self._moved(stage, len(text), own)
                    if moved is not None:
                        inputs, sources = moved
            if self.own.chains is not None and end is self.segments[-1]:
                self._read_for_chains(slot, text, sources)
            found = None
            if wanted.after != "nothing":
                said = None if read is None else read.predictions
                found = self._told(end.stage, said, [0], 1)
            yield Read(slot, found, 0, None)

    @torch.inference_mode()
    def _read_for_chains(self, slot: int, text: Sequence[int], sources: Tensor | None) -> None:
        """K/V of the draft exit, of a prompt with the states (P, n·H) that it reads."""
        assert self.own.chains is not None
        assert sources is not None
        ids, places = (torch.tensor([[*x]], device=self.device) for x in (text, range(len(text))))
        self.own.chains.prompt(torch.tensor([slot], device=self.device), ids, places, sources[None])

    def window(
        self, i: int, windows: list[Window], starts: Sequence[int], wanted: Wanted, least: int = 1
    ) -> Predictions | None:
        """As of passes."""
        part, found = self.segments[i], None
        if part.stage == self.mesh.pp_rank:
            found = self.own.window(part.number, windows, starts, wanted, least)
        if i + 1 < len(self.segments) and self.segments[i + 1].stage > part.stage:
            self._hand_on(part.stage, {w.slot: w.count for w in windows}, starts)
        if wanted.after == "nothing":
            return None
        length = 1 if wanted.after == "last" else max(window.count for window in windows)
        rows = list(range(len(windows))) if found is None else found.rows
        return self._told(part.stage, found, rows, length)

    def straight(
        self, newest: Mapping[int, int], starts: Sequence[int], wanted: Wanted
    ) -> RelayedStraight:
        """As of passes."""
        windows = [Window(slot, 1, [token]) for slot, token in newest.items()]
        return RelayedStraight(self, windows, [*starts], wanted)

    def verify(
        self, slots: list[int], said: Tensor, starts: Sequence[int], measure: str, samples: int
    ) -> tuple[list[list[float]], Predictions]:
        """As of passes; `chains` has told this process's own of the drafts."""
        rows, found, length = said.tolist(), None, 1 + said.shape[1] // 2
        last = self.mesh.pp - 1
        for stage in range(last + 1):
            if stage == self.mesh.pp_rank:
                own = self.own.verify(slots, said, starts, measure, samples)
                found = None if own is None else own[1]
            if stage < last:
                self._hand_on(stage, dict.fromkeys(slots, length), starts)
        return rows, self._told(last, found, list(range(len(slots))), length)

    def forget(self, slot: int) -> None:
        """As of passes."""
        self.own.forget(slot)

    def _hand_on(self, stage: int, counts: Mapping[int, int], starts: Sequence[int]) -> None:
        """Let the stage that follows one have what that one gave for so many tokens of slots."""
        places = [(slot, starts[slot] + k) for slot, count in counts.items() for k in range(count)]
        slots, positions = ([one[k] for one in places] for k in (0, 1))
        own, taken = self.own, None
        if stage == self.mesh.pp_rank:
            sources = None if own.sources is None else own.sources.take(slots, positions)
            taken = _beside(own.take(slots, positions), sources)
        moved = self._moved(stage, len(places), taken)
        if moved is not None:
            own.put(slots, positions, moved[0])
            if own.sources is not None:
                own.sources.put(slots, positions, moved[1])

    def _moved(self, stage: int, number: int, given: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Hidden states (n, H) behind a stage, and those a draft exit reads, (n, w), on the stage
        that follows; there alone."""
        if stage == self.mesh.pp_rank:
            assert given is not None
            dist.send(given.contiguous(), dst=self.mesh.next_stage)
        if stage + 1 != self.mesh.pp_rank:
            return None
        width, own = self.own.backbone.config.hidden_size, self.own
        more = 0 if own.sources is None else own.sources.given
        came = torch.empty((number, width + more), dtype=own.dtype, device=self.device)
        dist.recv(came, src=self.mesh.previous_stage)
        return came[:, :width], came[:, width:]

    def _told(self, stage: int, found: Predictions | None, rows: list[int], length: int) -> Told:
        """What a stage has found for windows, in so many rows, after each of `length` tokens."""
        answers = torch.empty(2, len(rows), length, dtype=torch.float64)
        if found is not None:
            for k, values in enumerate((found.tokens, found.confidences)):
                answers[k] = torch.tensor([values[row][:length] for row in rows])
        self.broadcast(answers, stage)
        return Told(self, stage, answers, found, rows)

    def broadcast(self, tensor: Tensor, stage: int) -> None:
        """Let every process have what its counterpart in a stage has."""
        source = self.mesh.counterpart(stage)
        dist.broadcast(tensor, src=source, group=self.mesh.group("pp"))


@dataclass
class RelayedStraight:
    """`Straight` of all stages, token by token.

    windows: of one token each, the newest. starts: by slot, as of `Passes.window`.
    """

    relay: Relay
    windows: list[Window]
    starts: list[int]
    wanted: Wanted

    @property
    def rows(self) -> list[int]:
        """All of what `find` gives."""
        return list(range(len(self.windows)))

    def find(self, count: int) -> Tensor:
        """As of `Straight`."""
        found, last = [], len(self.relay.segments) - 1
        nothing = Wanted("nothing", False)
        for _ in range(count):
            for i in range(last + 1):
                wanted = self.wanted if i == last else nothing
                told = self.relay.window(i, self.windows, self.starts, wanted)
            assert told is not None
            found.append([[row[0] for row in rows] for rows in (told.tokens, told.confidences)])
            pairs = zip(self.windows, found[-1][0], strict=True)
            self.windows = [Window(window.slot, 1, [int(token)]) for window, token in pairs]
            for window in self.windows:
                self.starts[window.slot] += 1
        return torch.tensor(found, dtype=torch.float64)


class RelayedChains:
    """`Chains` of the last stage, as every process of a relay has them."""

    def __init__(self, relay: Relay) -> None:
        self._relay, self._own = relay, relay.own.chains

    def set_bar(self, slot: int, bar: float) -> None:
        """As of `Chains`."""
        if self._own is not None:
            self._own.set_bar(slot, bar)

    def fill(self, links: Sequence[Link], starts: Sequence[int]) -> None:
        """As of `Chains`."""
        if self._own is not None:
            self._own.fill(links, starts)

    def draft(
        self, links: Sequence[Link], starts: Sequence[int], count: int, measure: str, samples: int
    ) -> tuple[list[int], Tensor]:
        """As of `Chains`; what the device says lies on the host before the last stage."""
        own, relay = self._relay.own, self._relay
        every = filled(links, starts, own.sizes if own.compile else None)
        # How many drafts the longest chain has, and what is said of so many.
        told = torch.zeros(len(every), 2 + 2 * count, dtype=torch.float64)
        said, slots = None, [link.slot for link in every]
        if self._own is not None:
            _, said = self._own.draft(links, starts, count, measure, samples)
            told[:, 0] = number = said.shape[1] // 2
            told[:, 1 : 2 + 2 * number] = said
        relay.broadcast(told, relay.mesh.pp - 1)
        if said is None:
            number = int(told[0, 0])
            said = told[:, 1 : 2 + 2 * number]
            drafts = said[:, 1 : 1 + number].long().tolist()
            windows = {
                link.slot: Window(link.slot, 1 + number, [link.ids[-1], *tokens])
                for link, tokens in zip(every, drafts, strict=True)
            }
            own.tell(slots, starts, windows, 1 + number)
        return slots, said


def _beside(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Both of (n, …) side by side, as far as they are there."""
    there = [one for one in (first, second) if one is not None]
    return torch.cat(there, -1) if there else None


class Told(Predictions):
    """Predictions that a stage has told the others of; logits it tells when they ask, as all do."""

    def __init__(
        self, relay: Relay, stage: int, answers: Tensor, found: Predictions | None, rows: list[int]
    ) -> None:
        """answers: (2, n, A), tokens and confidences of windows. found: what that stage has, and
        which rows of it the windows are."""
        super().__init__(torch.empty(0), answers, list(range(answers.shape[1])))
        self._relay, self._stage, self._found, self._own_rows = relay, stage, found, rows
        self._all: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """As of `Predictions`. Every process asks for them, or none."""
        if self._all is None:
            backbone = self._relay.own.backbone
            size = len(self.tokens), len(self.tokens[0]), backbone.config.vocab_size
            self._all = torch.empty(size, device=backbone.device)
            if self._found is not None:
                self._all.copy_(self._found.logits[self._own_rows, : size[1]])
            self._relay.broadcast(self._all, self._stage)
        return self._all
