"""What the server and the process of its engine say to each other, over a connection.

`Warm`, `Text`, `Cancel`, `Call`, `Heard` and `Stop` go to the engine, the others come from it,
`Facts` first.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ee_tuning.certificate import Certificate
from ee_tuning.decode import Request, Token
from ee_tuning.serve.processors import Likely, Seen


def send(connection: Connection, message: Any) -> None:
    """Copied: what torch makes of `Connection.send` would share tensors by files.

    Raises:
        OSError: the other side is gone.
    """
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """The next message.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    return pickle.loads(connection.recv_bytes())


class Warm(NamedTuple):
    """Warm up for most requests, see `Engine.warm_up`."""

    measures: list[str]
    texts: bool


class Text:
    """One text to write, as the engine's process knows it.

    number: what both sides call it by. written: tokens so far.
    """

    def __init__(
        self, request: Request, stop_ids: frozenset[int] = frozenset(), seen: Seen | None = None
    ) -> None:
        """stop_ids: tokens that end it. seen: among the request's processors, if it is wanted how
        likely tokens were."""
        self.number = self.written = 0
        self.request, self.stop_ids, self.seen = request, stop_ids, seen

    def settle(self, tokens: list[Token], time: float) -> Settled:
        """Tokens that came in a step, at least one, up to the one that ends the text, if there is
        one."""
        ends = [at for at, one in enumerate(tokens, 1) if one.ends or one.id in self.stop_ids]
        tokens = tokens[: ends[0]] if ends else tokens
        seen: list[Likely] = []
        if self.seen is not None:
            places = enumerate(tokens, start=len(self.request.ids) + self.written)
            seen = [self.seen.take(place, token.id) for place, token in places]
        self.written += len(tokens)
        return Settled(self.number, tokens, seen, time, bool(ends))


class Cancel(NamedTuple):
    """Nobody waits for this text any more."""

    number: int


class Call(NamedTuple):
    """A function to call with the model, and these arguments behind it."""

    number: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Heard(NamedTuple):
    """What was told to all clients is written."""


class Stop(NamedTuple):
    """There is nothing more to do."""


@dataclass
class Facts:
    """What the server has to know of the model, which is loaded.

    source: where its tokenizer lies. size: of the vocabulary. depth: layers. exit_layers: where
    exits are. ends: tokens that end a text. capacity: tokens of a text with its prompt.
    calibration: the exits'.
    """

    source: str
    size: int
    depth: int
    exit_layers: Sequence[int]
    ends: list[int]
    capacity: int
    calibration: Certificate | None


class State(NamedTuple):
    """Of the engine: ``ready``, or why it is dead."""

    said: str


class Begun(NamedTuple):
    """These texts have slots."""

    numbers: list[int]
    time: float


class Told(NamedTuple):
    """What has come of some texts. to_all: of all, so that `Heard` is the answer."""

    settled: list[Settled]
    to_all: bool


class Settled(NamedTuple):
    """Tokens of a text that have come, at least one, in one step or several.

    seen: how likely each was, if that is wanted. time: when the last came. ended: the text has, as
    far as the engine's process can tell.
    """

    number: int
    tokens: list[Token]
    seen: list[Likely]
    time: float
    ended: bool

    def and_then(self, later: Settled) -> Settled:
        """With those that came behind them."""
        tokens, seen = self.tokens + later.tokens, self.seen + later.seen
        return Settled(self.number, tokens, seen, later.time, later.ended)


class Failed(NamedTuple):
    """There is no more of this text."""

    number: int
    error: Exception


class Answer(NamedTuple):
    """What a call gave, or an exception."""

    number: int
    found: Any


class Line(NamedTuple):
    """One for the log."""

    said: dict[str, Any]


class Warned(NamedTuple):
    """A warning, for whoever started the server."""

    said: str
    category: type[Warning]
