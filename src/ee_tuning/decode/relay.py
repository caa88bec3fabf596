"""Passes over the stages of several processes, of which one works at a time.

For modes in which drafts wait for what the last stage says of those before them. Every process runs
the same engine, on the same requests, in step: a segment is computed by the stage that has it, what
it gives for its last layer moves on to the next stage, and all are told what it predicts, so they
decide alike. Nothing overlaps; a process needs the memory of its stage alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.decode.passes import Passes
from ee_tuning.decode.wanted import Predictions, Read, Wanted, Window
from ee_tuning.parallel.mesh import Mesh


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

    chains = None  # a draft exit reads states of layers that the process that has it has not
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

    def prompts(self, given: Mapping[int, Any], last: int, wanted: Wanted) -> Iterator[Read]:
        """As of passes, one text after another."""
        end = self.segments[last]
        for slot, text in given.items():
            inputs, read = text, None
            for stage in range(end.stage + 1):
                if stage == self.mesh.pp_rank:
                    asked = wanted if stage == end.stage else Wanted("nothing", False)
                    number = end.number if stage == end.stage else len(self.own.segments) - 1
                    (read,) = self.own.prompts({slot: inputs}, number, asked)
                if stage < end.stage:
                    inputs = self._moved(stage, len(text), None if read is None else read.hidden)
            found = None
            if wanted.after != "nothing":
                own = None if read is None or read.found is None else read.found.all
                found = self._told(end.stage, own, [0], 1).of(0, 0)
            yield Read(slot, found, None)

    def window(
        self, i: int, windows: list[Window], starts: Sequence[int], wanted: Wanted
    ) -> Predictions | None:
        """As of passes."""
        part, found = self.segments[i], None
        if part.stage == self.mesh.pp_rank:
            found = self.own.window(part.number, windows, starts, wanted)
        if i + 1 < len(self.segments) and self.segments[i + 1].stage > part.stage:
            places = [(w.slot, starts[w.slot] + k) for w in windows for k in range(w.count)]
            slots, positions = ([one[k] for one in places] for k in (0, 1))
            here = part.stage == self.mesh.pp_rank
            taken = self.own.take(slots, positions) if here else None
            moved = self._moved(part.stage, len(places), taken)
            if moved is not None:
                self.own.put(slots, positions, moved)
        if wanted.after == "nothing":
            return None
        length = 1 if wanted.after == "last" else max(window.count for window in windows)
        rows = list(range(len(windows))) if found is None else found.rows
        return self._told(part.stage, found, rows, length)

    def forget(self, slot: int) -> None:
        """As of passes."""
        self.own.forget(slot)

    def _moved(self, stage: int, number: int, hidden: Tensor | None) -> Tensor | None:
        """Hidden states (n, H) behind a stage, on the one that follows; there alone."""
        if stage == self.mesh.pp_rank:
            assert hidden is not None
            dist.send(hidden.contiguous(), dst=self.mesh.next_stage)
        if stage + 1 != self.mesh.pp_rank:
            return None
        width = self.own.backbone.config.hidden_size
        came = torch.empty((number, width), dtype=self.own.dtype, device=self.device)
        dist.recv(came, src=self.mesh.previous_stage)
        return came

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
        source = self.mesh.rank + (stage - self.mesh.pp_rank) * self.mesh.tp * self.mesh.dp
        dist.broadcast(tensor, src=source, group=self.mesh.group("pp"))


class Told(Predictions):
    """Predictions that a stage has told the others of; logits it tells when they ask, as all do."""

    def __init__(
        self, relay: Relay, stage: int, answers: Tensor, found: Predictions | None, rows: list[int]
    ) -> None:
        """answers: (2, n, A), tokens and confidences of windows. found: what that stage has, and
        which rows of it the windows are."""
        tokens, confidences = answers.tolist()
        super().__init__(torch.empty(0), tokens, confidences, list(range(len(tokens))))
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
