"""A wave of texts: prompts in, records out."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ee_tuning.decode.arguments import end_tokens
from ee_tuning.decode.engine import Engine
from ee_tuning.decode.sequences import never
from ee_tuning.decode.settings import Full
from ee_tuning.decode.text import encode_chat
from ee_tuning.decode.whole import Text, whole_texts
from ee_tuning.errors import UserError
from ee_tuning.passes.draws import SEEDS, Warp
from ee_tuning.regenerate.config import RegenerateConfig
from ee_tuning.regenerate.prompts import NOTHING, Prompt, beginning
from ee_tuning.regenerate.template import Template, ends_by_mark

QUESTION, ANSWER = "question", "answer"


@dataclass(frozen=True)
class Written:
    """What became of a text: its record and how many tokens of it the model wrote, or why it was
    left out."""

    source: str
    record: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    left_out: str = ""


@dataclass(frozen=True)
class Job:
    """A part of a text that is being written.

    part: the question, or the answer, or what a text goes on with. messages: before it, if it is a
    chat. begin: the text before it. tokens: that the model has written of the parts before.
    """

    prompt: Prompt
    part: str = ANSWER
    messages: Sequence[dict[str, Any]] = ()
    begin: str = ""
    tokens: int = 0


class Writer:
    """Writes waves of texts with an engine.

    template: of chats that begin from nothing; None where these are texts. ends: tokens that end a
    text.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        config: RegenerateConfig,
        template: Template | None,
        ends: set[int],
    ) -> None:
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.template, self.ends = template, frozenset(ends)
        self._policy = Full(engine.sequences.stops[-1])
        self._warp = Warp(config.temperature, config.top_k, config.top_p, config.min_p)

    def wave(self, prompts: Sequence[Prompt], on_tokens: Callable[[int], None]) -> list[Written]:
        """What becomes of each of `prompts`, in their order.

        on_tokens: told how many tokens were written, as parts of texts end.
        """
        found: dict[int, Written] = {}
        jobs: dict[Text, Job] = {}
        waiting: deque[Text] = deque()
        questions: set[str] = set()

        def take(job: Job, next: Text | Written) -> None:
            if isinstance(next, Written):
                found[job.prompt.number] = next
            else:
                jobs[next] = job
                waiting.append(next)

        for prompt in prompts:
            take(*self._first(prompt))
        for text, tokens in whole_texts(self.engine, waiting):
            on_tokens(len(tokens))
            job = jobs.pop(text)
            take(*self._next(job, text, tokens, questions))
        return [found[prompt.number] for prompt in prompts]

    def _first(self, prompt: Prompt) -> tuple[Job, Text | Written]:
        """What a text begins with, or why it does not."""
        job = Job(prompt)
        if prompt.problem:
            return job, Written(prompt.source, left_out="malformed")
        if prompt.source == NOTHING and self.template is not None:
            job = replace(job, part=QUESTION)
            return job, self._text(job, self.template.before, self.template)
        if prompt.messages:
            job = replace(job, messages=prompt.messages)
            return job, self._answer(job)
        ids, begin = [self.tokenizer.bos_token_id], ""
        if prompt.source != NOTHING:
            ids, begin = beginning(self.tokenizer, prompt, self.config.prompt_tokens)
        return replace(job, begin=begin), self._text(job, ids)

    def _answer(self, job: Job) -> Text | Written:
        ids = encode_chat(self.tokenizer, list(job.messages))
        return self._text(job, ids)

    def _text(self, job: Job, ids: list[int], asks: Template | None = None) -> Text | Written:
        """What is to be written after `ids`; asks: the template of which it is the question."""
        config, room = self.config, self.engine.passes.capacity
        if not ids:
            return Written(job.prompt.source, left_out="empty")
        if len(ids) > config.max_prompt_tokens or len(ids) >= room:
            return Written(job.prompt.source, left_out="too long")
        most = config.max_question_tokens if asks else config.max_new_tokens
        sampled = self._warp.temperature > 0
        return Text(
            ids,
            self._policy,
            min(len(ids) + most, room),
            stops=ends_by_mark(self.tokenizer, asks, len(ids)) if asks else never,
            ends=asks.ends if asks else self.ends,
            seed=seed_of(config.seed, job.prompt.number, job.part) if sampled else None,
            warp=self._warp,
        )

    def _next(
        self, job: Job, text: Text, tokens: list[int], questions: set[str]
    ) -> tuple[Job, Text | Written]:
        """What follows a part that has ended.

        questions: that were written in this wave.
        """
        source, ended = job.prompt.source, tokens[-1] in text.ends
        body = tokens[:-1] if ended else tokens
        words = str(self.tokenizer.decode(body, skip_special_tokens=True))
        job = replace(job, tokens=job.tokens + len(tokens))
        if job.part == QUESTION:
            assert self.template is not None
            mark = self.template.mark
            if not ended and not (mark and mark in words):
                return job, Written(source, left_out="no end of the question")
            question = (words.partition(mark)[0] if mark else words).strip()
            if not question:
                return job, Written(source, left_out="no question")
            if self.config.dedup and plain(question) in questions:
                return job, Written(source, left_out="duplicate")
            questions.add(plain(question))
            system = self.config.system
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": question})
            job = replace(job, part=ANSWER, messages=messages)
            return job, self._answer(job)
        if self.config.drop_unfinished and not ended:
            return job, Written(source, left_out="unfinished")
        if job.begin:
            whole = str(self.tokenizer.decode([*text.ids, *body], skip_special_tokens=True))
            words = whole.removeprefix(job.begin) if whole.startswith(job.begin) else words
        words = words if ended else words.rstrip("\ufffd")  # half a character
        if not words.strip():
            return job, Written(source, left_out="empty")
        record = _record(job, words) | {"source": source, "finished": ended}
        return job, Written(source, record, job.tokens)


def _record(job: Job, words: str) -> dict[str, Any]:
    """What tune reads so that it learns what the model wrote."""
    if not job.messages:
        return {"prompt": job.begin, "completion": words} if job.begin else {"text": words}
    answer = {"role": "assistant", "content": words}
    if any(turn["role"] not in ("system", "user") for turn in job.messages):
        return {"prompt": list(job.messages), "completion": [answer]}
    return {"messages": [*job.messages, answer]}


def plain(text: str) -> str:
    """What is the same of texts that differ in white space or capitals."""
    return " ".join(text.casefold().split())


def key_of(record: dict[str, Any]) -> str:
    """The same for records of which one is enough: of the model's own questions by these."""
    if record["source"] == NOTHING and "messages" in record:
        words = [turn["content"] for turn in record["messages"] if turn["role"] == "user"]
    else:
        words = [record.get(name, "") for name in ("messages", "prompt", "completion", "text")]
    return hashlib.sha256(plain(repr(words)).encode()).hexdigest()[:32]


def seed_of(seed: int, number: int, part: str) -> int:
    """What a part of text `number` is drawn with."""
    digest = hashlib.sha256(f"{seed} {number} {part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % SEEDS


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text, as the model's generation config and the tokenizer say.

    Raises:
        UserError: there are none.
    """
    ends = end_tokens(model, tokenizer)
    if not ends:
        raise UserError(
            "neither the model nor the tokenizer has a token that ends a text: set eos_token in "
            "tokenizer_config.json"
        )
    return ends
