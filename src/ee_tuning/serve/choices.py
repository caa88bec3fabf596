"""One text of a request, from what the engine settles to what its client gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ee_tuning.decode import Request, Token
from ee_tuning.decode.text import TextStream
from ee_tuning.exit_config import mean_depth
from ee_tuning.serve.messages import Settled, Text
from ee_tuning.serve.processors import Likely, Seen


class Stops:
    """Strings that end a text: what may be the beginning of one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings, self._held = strings, ""

    def put(self, new: str, ends: bool = True) -> tuple[str, bool]:
        """What is safe to show after `new` text, and whether the text has ended.

        ends: whether it may.
        """
        if not self.strings or not new:
            return new, False
        text = self._held + new
        found = [place for stop in self.strings if (place := text.find(stop)) >= 0]
        if found and ends:
            self._held = ""
            return text[: min(found)], True
        keep = max(self._tail(text, stop) for stop in self.strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def rest(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _tail(text: str, stop: str) -> int:
        """How long the end of the text is that a stop string may begin with."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if stop.startswith(text[len(text) - length :]):
                return length
        return 0


@dataclass
class Delta:
    """What a choice has more of: text, and the tokens that the engine settled meanwhile.

    seen: per token, if its log probability is wanted. rounds: of drafts that ended, how many there
    were and how many were kept. finish: why the text has ended; ee: how it was decoded, with that.
    error: why it failed.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    seen: list[Likely] = field(default_factory=list)
    rounds: list[tuple[int, int]] = field(default_factory=list)
    finish: str | None = None
    error: Exception | None = None
    ee: dict[str, Any] | None = None


class Choice:
    """One text that is written: `text` is what the engine's process knows of it.

    index: among those of its job. started, first, ended: when it got a slot, its first token, its
    last.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stops: Sequence[str] = (),
        stop_ids: frozenset[int] = frozenset(),
        least: int = 0,
        seen: Seen | None = None,
    ) -> None:
        """stop_ids: tokens that end it, and are not in its text. least: tokens before a string may
        end it."""
        self.index, self.text, self.least = index, Text(request, stop_ids, seen), least
        self.stops = Stops(stops)
        self.stream = TextStream(tokenizer, skip_special_tokens=True, after=request.ids)
        self.layers: list[int] = []
        self.drafted = self.kept = 0
        self.started = self.first = self.ended = 0.0
        self.finish: str | None = None
        self._run = 0  # drafts kept since the last token of the end's own

    @property
    def request(self) -> Request:
        """What the engine is asked for."""
        return self.text.request

    def put(self, settled: Settled) -> Delta:
        """What settled tokens bring. Not called any more once `finish` is said."""
        tokens, self.ended = settled.tokens, settled.time
        self.first = self.first or self.ended
        delta = Delta(self.index)
        # One by one only where the text may end between two of them.
        each = 1 if self.stops.strings else len(tokens)
        for at in range(0, len(tokens), each):
            if self.finish is None:
                self._add(delta, tokens[at : at + each])
        delta.seen = settled.seen[: len(delta.tokens)]
        return delta

    def _add(self, delta: Delta, tokens: list[Token]) -> None:
        """Some more tokens, the last of which may end the text."""
        last = tokens[-1]
        self.layers += [token.exit_layer for token in tokens]
        delta.tokens += tokens
        if self.request.policy.verifies:
            delta.rounds += [ended for token in tokens for ended in self._round(token)]
        stops = last.id in self.text.stop_ids
        new = self.stream.put([token.id for token in (tokens[:-1] if stops else tokens)])
        text, ended = self.stops.put(new, len(self.layers) >= self.least)
        delta.text += text
        self.finish = "stop" if stops or ended else "length" if last.ends else None
        if self.finish is None:
            return
        if not ended:
            rest, ended = self.stops.put(self.stream.end())
            delta.text += rest + ("" if ended else self.stops.rest())
        delta.finish, delta.ee = self.finish, self.report()

    def _round(self, token: Token) -> list[tuple[int, int]]:
        """The round of drafts that this token ends, if it does."""
        if token.exit_layer != self.request.policy.end:
            self._run += 1
            return []
        drafts, kept = self._run + len(token.rejected), self._run
        self.drafted, self.kept, self._run = self.drafted + drafts, self.kept + kept, 0
        return [(drafts, kept)] if drafts else []

    def report(self) -> dict[str, Any]:
        """Where the tokens left, for the client."""
        seconds = self.ended - self.started
        return {
            "mean_depth": round(mean_depth(Counter(self.layers)), 3),
            "exit_layers": self.layers,
            "drafted": self.drafted,
            "kept": self.kept,
            "tokens_per_second": round(len(self.layers) / seconds, 2) if seconds > 0 else 0.0,
        }


def joined(deltas: Sequence[Delta]) -> Delta:
    """Those of one choice, in a row, as one."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return Delta(
        last.index,
        "".join(one.text for one in deltas),
        [token for one in deltas for token in one.tokens],
        [seen for one in deltas for seen in one.seen],
        [ended for one in deltas for ended in one.rounds],
        last.finish,
        last.error,
        last.ee,
    )
