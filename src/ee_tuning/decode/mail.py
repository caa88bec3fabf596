"""What the stages of a pipeline tell each other while they decode.

News of tokens, a small table on the host, goes from a stage to the next one, and to the first one
when a token was found; hidden states follow them to the next stage on the device. One process of
each stage does the talking and tells its tensor-parallel group.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from enum import IntEnum
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.sockets import connect

UNDERWAY = 64  # messages that may not have been read yet


class Kind(IntEnum):
    """Of a message: tokens of any rows, a new row's prompt, or that there will be no more."""

    TOKENS = 0
    PROMPT = 1
    STOP = 2


class Fate(IntEnum):
    """Of a row with its newest token."""

    GOES_ON = 0
    ENDS = 1
    GIVEN_UP = 2


@dataclass
class News:
    """A token of the row in `slot`: where it left, how sure, and what becomes of the row.

    position: its place in the row. asks: what follows it is not known yet. states: how many hidden
    states come with it.
    """

    slot: int
    id: int = 0
    position: int = 0
    exit_layer: int = 0
    confidence: float = 0.0
    fate: int = Fate.GOES_ON
    asks: bool = False
    states: int = 0


@dataclass
class Message:
    """News of a kind; hidden: (N, H), those of all `states` in order, behind the sender."""

    kind: Kind
    news: list[News]
    hidden: Tensor | None = None

    @property
    def states(self) -> int:
        """How many hidden states belong to it."""
        return sum(item.states for item in self.news)


class Mail:
    """This stage's connections with other ones.

    News goes by way of the hosts, at once. Hidden states between GPUs follow on these, behind what
    computes them, so neither host waits for it; those of a CPU go with the news.
    """

    def __init__(self, mesh: Mesh, longest: int, like: Tensor) -> None:
        """longest: news in a message at most. like: (0, H), a hidden state's dtype and device.
        Every process of the mesh makes one."""
        self.mesh, self.longest, self.like = mesh, longest, like
        self.is_first, self.is_last = mesh.pp_rank == 0, mesh.pp_rank == mesh.pp - 1
        self.speaks, self.on_host = mesh.tp_rank == 0, like.device.type == "cpu"
        self._held: Message | None = None  # come, not read yet
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        to = [] if self.is_last else [mesh.next_stage]
        to += [] if self.is_first else [mesh.counterpart(0)]
        self._to, self._from = connect(mesh, list(dict.fromkeys(to)) if self.speaks else [])
        self._open: list[Connection] = []  # that have more to say

    def open(self) -> None:
        """Every sender says something from now on, until it has said that there will be no more."""
        self._open = list(self._from)

    def close(self) -> None:
        """Say that there will be no more, and wait until nothing is on its way."""
        self.tell_next(Message(Kind.STOP, []))
        self.tell_first(Message(Kind.STOP, []))
        while self._open:
            self._next()
        while self._sent:
            self._sent.popleft()[0].wait()

    def tell_next(self, message: Message) -> None:
        """To the next stage, if there is one."""
        if self.speaks and not self.is_last:
            self._send(message, self.mesh.next_stage)

    def tell_first(self, message: Message) -> None:
        """To the first stage, unless this is it."""
        if self.speaks and not self.is_first:
            self._send(message, self.mesh.counterpart(0))

    def answers(self, wait: bool) -> list[News]:
        """What later stages have told the first one; wait: until there is something."""

        def take() -> Message:
            found: list[News] = []
            while (message := self._next(wait=wait and not found)) is not None:
                found += message.news
            return Message(Kind.TOKENS, found)

        return self._shared(take).news

    def read(self) -> Message:
        """What the stage before has told this one: the next message, with those of tokens that
        have arrived after it, as many as make one."""
        parts: list[Message] = []

        def take() -> Message:
            first = self._next()
            assert first is not None
            parts.append(first)
            number = len(first.news)
            while first.kind == Kind.TOKENS and (more := self._next(wait=False)) is not None:
                number += len(more.news)
                if more.kind != Kind.TOKENS or number > self.longest:
                    self._held = more
                    break
                parts.append(more)
            return Message(first.kind, [item for part in parts for item in part.news])

        message = self._shared(take)
        message.hidden = self._hidden(message.states, parts)
        return message

    def _next(self, wait: bool = True) -> Message | None:
        """The next message of any sender; None, if none is there and it is not to `wait`."""
        if self._held is not None:
            message, self._held = self._held, None
            return message
        ready = wait_for(self._open, self.mesh.patience if wait else 0) if self._open else []
        if not ready:
            if wait:
                raise TimeoutError(f"time-out: no word for {self.mesh.patience:g} seconds")
            return None
        (sender, *_) = ready
        assert isinstance(sender, Connection)
        try:
            message = _message(sender.recv_bytes())
            if message.states and self.on_host:
                message.hidden = self.like.new_empty(message.states, self.like.shape[1])
                sender.recv_bytes_into(_bytes(message.hidden))
        except EOFError as error:
            raise ConnectionError(f"rank {self._from[sender]} has closed its connection") from error
        if message.kind == Kind.STOP:
            self._open.remove(sender)
        return message

    def _send(self, message: Message, to: int) -> None:
        self._to[to].send_bytes(_packed(message))
        if message.states:
            assert message.hidden is not None
            hidden = message.hidden.contiguous()
            if self.on_host:
                self._to[to].send_bytes(_bytes(hidden))
            else:
                self._post(hidden, dist.isend(hidden, dst=to))

    def _post(self, tensor: Tensor, work: dist.Work | None) -> None:
        assert work is not None
        self._sent.append((work, tensor))
        while len(self._sent) > UNDERWAY:
            self._sent.popleft()[0].wait()

    def _hidden(self, states: int, parts: Sequence[Message]) -> Tensor:
        """The hidden states of messages, `states` in all, on every process of this stage."""
        hidden = self.like.new_empty(states, self.like.shape[1])
        sizes = [part.states for part in parts]  # none on those that do not speak
        for part, own in zip(parts, hidden.split(sizes) if sizes else (), strict=True):
            if part.hidden is not None:
                own.copy_(part.hidden)
            elif part.states:
                dist.recv(own, src=self.mesh.previous_stage)
        if self.mesh.tp > 1 and states:
            self._broadcast(hidden)
        return hidden

    def _shared(self, take: Callable[[], Message]) -> Message:
        """What `take` gives on the process that speaks, on every process of this stage."""
        if self.mesh.tp == 1:
            return take()
        # As long as any message: the others do not know how long this one is.
        table = torch.zeros(8 * (1 + (1 + self.longest) * len(fields(News))), dtype=torch.uint8)
        if self.speaks:
            said = torch.frombuffer(bytearray(_packed(take())), dtype=torch.uint8)
            table[: len(said)] = said
        self._broadcast(table)
        return _message(table.numpy().tobytes())

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=self.mesh.speaker, group=self.mesh.group("tp"))


def _bytes(tensor: Tensor) -> memoryview:
    """Those of a tensor on the host, themselves."""
    return tensor.view(torch.uint8).flatten().numpy().data


def _packed(message: Message) -> bytes:
    values = [value for item in message.news for value in astuple(item)]
    return array("d", [message.kind, len(message.news), *values]).tobytes()


def _message(packed: bytes) -> Message:
    """What was packed; zeros may follow."""
    kind, number, *values = array("d", packed)
    width = len(fields(News))
    rows = [values[at : at + width] for at in range(0, int(number) * width, width)]
    news = [
        News(int(slot), int(id), int(place), int(layer), sure, int(fate), bool(asks), int(states))
        for slot, id, place, layer, sure, fate, asks, states in rows
    ]
    return Message(Kind(int(kind)), news)
