"""What the stages of a pipeline tell each other while they decode.

News of tokens, a small table on the host, goes from a stage to the next one, and to the first one
when a token was found; hidden states follow them to the next stage on the device. One process of
each stage does the talking and tells its tensor-parallel group.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.mesh import Mesh

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
    """This stage's letter box, and the way to other ones'.

    A thread for each sender reads what arrives, so that neither a sender waits for this stage's
    work, nor this stage for one sender while another has something for it.
    """

    def __init__(self, mesh: Mesh, longest: int, like: Tensor) -> None:
        """longest: news in a message at most. like: (0, H), a hidden state's dtype and device."""
        self.mesh, self.longest, self.like = mesh, longest, like
        self.is_first, self.is_last = mesh.pp_rank == 0, mesh.pp_rank == mesh.pp - 1
        self.speaks = mesh.tp_rank == 0
        self._arrived: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._held: Message | None = None  # taken out of the queue, not read yet
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._listeners: list[threading.Thread] = []

    def open(self) -> None:
        """Listen until every sender has said that there will be no more."""
        if not self.speaks:
            return
        later = [self.mesh.counterpart(stage) for stage in range(1, self.mesh.pp)]
        senders = later if self.is_first else [self.mesh.previous_stage]
        self._listeners = [
            threading.Thread(target=self._listen, args=(sender,), daemon=True) for sender in senders
        ]
        for listener in self._listeners:
            listener.start()

    def close(self) -> None:
        """Say that there will be no more, and wait until nothing is on its way."""
        self.tell_next(Message(Kind.STOP, []))
        self.tell_first(Message(Kind.STOP, []))
        for listener in self._listeners:
            listener.join()
        while not self._arrived.empty():
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
            while (wait and not found) or not self._arrived.empty():
                found += self._next().news
            return Message(Kind.TOKENS, found)

        return self._shared(take).news

    def read(self) -> Message:
        """What the stage before has told this one: the next message, with those of tokens that
        have arrived after it, as many as make one."""
        parts: list[Message] = []

        def take() -> Message:
            parts.append(self._next())
            while parts[0].kind == Kind.TOKENS and not self._arrived.empty():
                self._held = self._next()
                news = [item for part in (*parts, self._held) for item in part.news]
                if self._held.kind != Kind.TOKENS or len(news) > self.longest:
                    break
                parts.append(self._held)
                self._held = None
            return Message(parts[0].kind, [item for part in parts for item in part.news])

        message = self._shared(take)
        message.hidden = self._hidden(message.states, [part.states for part in parts])
        return message

    def _next(self) -> Message:
        if self._held is not None:
            message, self._held = self._held, None
            return message
        found = self._arrived.get()
        if isinstance(found, Exception):
            raise found
        return found

    def _listen(self, sender: int) -> None:
        """A thread: put what arrives into the queue, or why nothing can any more."""
        kind = None
        try:
            while kind != Kind.STOP:
                table = self._empty_table()
                dist.recv(table, src=sender, group=self.mesh.host)
                message = _message(table)
                kind = message.kind
                self._arrived.put(message)
        except Exception as error:
            self._arrived.put(error)

    def _send(self, message: Message, to: int) -> None:
        table = _fill(self._empty_table(), message)
        self._post(table, dist.isend(table, dst=to, group=self.mesh.host))
        if message.states:
            assert message.hidden is not None
            hidden = message.hidden.contiguous()
            self._post(hidden, dist.isend(hidden, dst=to))

    def _post(self, tensor: Tensor, work: dist.Work | None) -> None:
        assert work is not None
        self._sent.append((work, tensor))
        while len(self._sent) > UNDERWAY:
            self._sent.popleft()[0].wait()

    def _hidden(self, states: int, parts: Sequence[int]) -> Tensor:
        """The hidden states of messages with so many each, on every process of this stage."""
        hidden = self.like.new_empty(states, self.like.shape[1])
        for part in hidden.split(list(parts)) if self.speaks and states else ():
            if len(part):
                dist.recv(part, src=self.mesh.previous_stage)
        if self.mesh.tp > 1 and states:
            self._broadcast(hidden)
        return hidden

    def _shared(self, take: Callable[[], Message]) -> Message:
        """What `take` gives on the process that speaks, on every process of this stage."""
        if self.mesh.tp == 1:
            return take()
        table = self._empty_table()
        if self.speaks:
            _fill(table, take())
        self._broadcast(table)
        return _message(table)

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=self.mesh.speaker, group=self.mesh.group("tp"))

    def _empty_table(self) -> Tensor:
        """The size of every message: a row for the kind and number of news, one for each."""
        return torch.zeros(1 + self.longest, len(fields(News)), dtype=torch.float64)


def _fill(table: Tensor, message: Message) -> Tensor:
    rows = [list(astuple(item)) for item in message.news]
    table[0, :2] = torch.tensor([message.kind, len(rows)])
    if rows:
        table[1 : 1 + len(rows)] = torch.tensor(rows, dtype=torch.float64)
    return table


def _message(table: Tensor) -> Message:
    (kind, number, *_), *rows = table.tolist()
    news = [
        News(int(slot), int(id), int(place), int(layer), sure, int(fate), bool(asks), int(states))
        for slot, id, place, layer, sure, fate, asks, states in rows[: int(number)]
    ]
    return Message(Kind(int(kind)), news)
