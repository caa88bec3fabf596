"""Replies as OpenAI writes them, with what exits add: whole ones, and chunks of streams."""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi.sse import format_sse_event
from openai.types import Completion
from openai.types.chat import ChatCompletion

from ee_tuning.serve.choices import Delta
from ee_tuning.serve.pieces import Pieces
from ee_tuning.serve.processors import Likely
from ee_tuning.serve.reading import Asked

DONE = format_sse_event(data_str="[DONE]")
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # one for all chunks


def event(data: dict[str, Any]) -> bytes:
    """One of a stream."""
    return format_sse_event(data_str=ENCODER.encode(data))


@dataclass
class Head:
    """What begins every reply to a request: a prompt's text or none, per choice."""

    asked: Asked
    pieces: Pieces
    model: str
    returns_exits: bool = False
    prompts: list[str] = field(default_factory=list)  # with echo
    scores: list[list[Likely]] = field(default_factory=list)  # of the prompts
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""
    written: int = 0  # tokens

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        read = sum(map(len, self.asked.prompts))
        return {
            "prompt_tokens": read,
            "completion_tokens": self.written,
            "total_tokens": read + self.written,
        }


class Reply:
    """One kind of replies; a subclass for each route.

    Raises nothing: what goes in has been checked.
    """

    name, chunk, prefix = "", "", ""

    def __init__(self, head: Head) -> None:
        self.head = head
        head.id = f"{self.prefix}-{uuid4().hex}"
        self._offsets: dict[int, int] = {}  # by choice: characters that are whole by now
        self._torn: dict[int, codecs.IncrementalDecoder] = {}  # by choice: what is not yet

    def whole(self, deltas: Sequence[Delta]) -> Any:
        """The reply to a request that is not streamed: each choice's text and end."""
        raise NotImplementedError

    def start(self) -> list[dict[str, Any]]:
        """The chunks that a stream begins with."""
        raise NotImplementedError

    def piece(self, delta: Delta) -> dict[str, Any]:
        """The chunk for what a choice has more of."""
        raise NotImplementedError

    def last(self) -> dict[str, Any]:
        """The chunk that says how many tokens there were."""
        return self._base(self.chunk, []) | {"usage": self.head.usage()}

    def is_worth_it(self, delta: Delta) -> bool:
        """Whether a chunk would say anything."""
        says = delta.text or delta.finish or self.head.asked.top is not None
        return bool(says or self.head.returns_exits)

    def _base(self, name: str, choices: list[Any]) -> dict[str, Any]:
        head = self.head
        return {
            "id": head.id, "object": name, "created": head.created, "model": head.model,
            "choices": choices,
        }  # fmt: skip

    def _exits(self, delta: Delta) -> dict[str, Any]:
        """What is said of exits: token by token if that was asked for, the sum with the end."""
        found = dict(delta.ee or {})
        if self.head.returns_exits:
            found["tokens"] = [
                {
                    "id": token.id,
                    "text": self.head.pieces.text(token.id),
                    "exit_layer": token.exit_layer,
                    "confidence": round(token.confidence, 4),
                    "rejected": [self.head.pieces.text(draft) for draft in token.rejected],
                }
                for token in delta.tokens
            ]
        return {"ee": found} if found else {}


class CompletionReply(Reply):
    """Of `/v1/completions`."""

    name, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def whole(self, deltas: Sequence[Delta]) -> Completion:
        """With the prompts before the texts, if they are to be there."""
        echoed = {choice["index"]: choice for chunk in self.start() for choice in chunk["choices"]}
        choices = []
        for delta in deltas:
            own = self._choice(delta)
            if delta.index in echoed:
                before = echoed[delta.index]
                own["text"] = before["text"] + own["text"]
                if own["logprobs"] is not None:
                    own["logprobs"] = {
                        name: before["logprobs"][name] + own["logprobs"][name]
                        for name in own["logprobs"]
                    }
            choices.append(own)
        return Completion.construct(**self._base(self.name, choices), usage=self.head.usage())

    def start(self) -> list[dict[str, Any]]:
        """The prompts, if they are to be there."""
        head, n = self.head, self.head.asked.n
        found = []
        for index in range(len(head.prompts) * n):
            prompt, logprobs = index // n, None
            if head.scores:
                first = Likely(head.asked.prompts[prompt][0], 0.0, [])
                logprobs = self._logprobs(index, [first, *head.scores[prompt]])
                logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None
            elif head.asked.top is not None:
                logprobs = self._logprobs(index, [])
            self._offsets[index] = len(head.prompts[prompt])
            self._torn.pop(index, None)
            choice = {
                "index": index, "text": head.prompts[prompt], "logprobs": logprobs,
                "finish_reason": None,
            }  # fmt: skip
            found.append(self._base(self.chunk, [choice]))
        return found

    def piece(self, delta: Delta) -> dict[str, Any]:
        """Text, log probabilities, exits."""
        return self._base(self.chunk, [self._choice(delta)])

    def _choice(self, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self.head.asked.top is not None:
            logprobs = self._logprobs(delta.index, delta.seen)
        return {
            "index": delta.index, "text": delta.text, "logprobs": logprobs,
            "finish_reason": delta.finish, **self._exits(delta),
        }  # fmt: skip

    def _logprobs(self, index: int, seen: Sequence[Likely]) -> dict[str, Any]:
        text, offsets = self.head.pieces.text, []
        torn = self._torn.setdefault(index, codecs.getincrementaldecoder("utf-8")("replace"))
        for one in seen:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(torn.decode(self.head.pieces.bytes(one.token)))
        return {
            "text_offset": offsets,
            "token_logprobs": [one.logprob for one in seen],
            "tokens": [text(one.token) for one in seen],
            "top_logprobs": [self._top(one) for one in seen],
        }

    def _top(self, one: Likely) -> dict[str, float]:
        """The likeliest tokens, and the one there is; of those with the same text the likelier."""
        found: dict[str, float] = {}
        for token, p in [*one.top, (one.token, one.logprob)]:
            found.setdefault(self.head.pieces.text(token), p)
        return found


class ChatReply(Reply):
    """Of `/v1/chat/completions`."""

    name, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, deltas: Sequence[Delta]) -> ChatCompletion:
        """With a message for each choice."""
        choices = [
            {
                "index": delta.index,
                "message": {"role": "assistant", "content": delta.text},
                "logprobs": self._logprobs(delta.seen),
                "finish_reason": delta.finish,
                **self._exits(delta),
            }
            for delta in deltas
        ]
        return ChatCompletion.construct(**self._base(self.name, choices), usage=self.head.usage())

    def start(self) -> list[dict[str, Any]]:
        """Who speaks."""
        role = {"role": "assistant", "content": ""}
        return [
            self._base(
                self.chunk,
                [{"index": choice.index, "delta": role, "logprobs": None, "finish_reason": None}],
            )
            for choice in self.head.asked.choices
        ]

    def piece(self, delta: Delta) -> dict[str, Any]:
        """Text, log probabilities, exits."""
        choice = {
            "index": delta.index,
            "delta": {"content": delta.text},
            "logprobs": self._logprobs(delta.seen),
            "finish_reason": delta.finish,
            **self._exits(delta),
        }
        return self._base(self.chunk, [choice])

    def _logprobs(self, seen: Sequence[Likely]) -> dict[str, Any] | None:
        if self.head.asked.top is None:
            return None
        content = [
            self._said(one.token, one.logprob)
            | {"top_logprobs": [self._said(*pair) for pair in one.top]}
            for one in seen
        ]
        return {"content": content, "refusal": None}

    def _said(self, token: int, logprob: float) -> dict[str, Any]:
        pieces = self.head.pieces
        own = list(pieces.bytes(token))
        return {"token": pieces.text(token), "logprob": logprob, "bytes": own}
