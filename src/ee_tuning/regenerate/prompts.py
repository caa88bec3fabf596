"""What each text goes on from: a record of some source, or nothing, by the text's number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ee_tuning.data.forms import BadRecord, Chat, Completion, Instruction, find_form, messages_of
from ee_tuning.data.readers import Record
from ee_tuning.data.sources import Source
from ee_tuning.errors import UserError
from ee_tuning.regenerate.config import RegenerateConfig

NOTHING = "nothing"  # the name of the source without records
CHARACTERS = 64  # of a document that are looked at for each of its first tokens, at least


@dataclass(frozen=True)
class Prompt:
    """What text `number` goes on from: messages, or a text, or if there is neither, nothing.

    problem: why the record cannot be used, if so. text: of a document its beginning, which may be
    longer than what is gone on from; whole: it is a prompt, and is not.
    """

    number: int
    source: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    tokens: np.ndarray | None = None
    whole: bool = False
    problem: str = ""


class Reading(Protocol):
    """The settings that say what is taken of a record."""

    text_field: str
    prompt_tokens: int
    system: str


def shares_of(config: RegenerateConfig, sources: Sequence[Source]) -> list[float]:
    """The share of each source, and of nothing, the last one; they sum to 1.

    Raises:
        UserError: the share of nothing is none, or there is no other source.
    """
    alone = config.from_nothing
    if alone is None:
        alone = 0.0 if sources else 1.0
    if not 0 <= alone <= 1:
        raise UserError(f"from_nothing {alone:g} is no share: give a number from 0 to 1")
    if not sources and alone < 1:
        raise UserError(
            f"from_nothing is {alone:g}, and the other texts have no prompts: name some with --data"
        )
    weights = [source.weight or 1.0 for source in sources]
    return [*((1 - alone) * weight / sum(weights) for weight in weights), alone]


def in_turns(shares: Sequence[float]) -> Iterator[int]:
    """The source of text 0, 1, …: always the one that is furthest behind its share.

    Shares may change meanwhile: one without any has no more turns, and when none has, that is all.
    """
    counts = [0] * len(shares)
    number = 0
    while any(shares):
        number += 1
        behind = [s * number - n if s else -inf for s, n in zip(shares, counts, strict=True)]
        chosen = behind.index(max(behind))
        counts[chosen] += 1
        yield chosen


def prompts(config: RegenerateConfig, sources: Sequence[Source], chats: bool) -> Iterator[Prompt]:
    """The prompt of text 0, 1, …; a source that has run out starts again.

    Where that would only give the same texts, greedily, and each is to come once, its turns are
    the others', and the prompts end when all have run out. chats: prompts are a user's words, where
    they are not documents.

    Raises:
        UserError: a source cannot be read or has no records, or a record is malformed.
    """
    again = config.temperature > 0 or not config.dedup
    records = [_records(source, config.seed, again) for source in sources]
    shares, numbers = shares_of(config, sources), count()
    for place in in_turns(shares):
        if place == len(sources):
            yield Prompt(next(numbers), NOTHING)
            continue
        record, source = next(records[place], None), sources[place].name
        if record is None:
            shares[place] = 0.0
            continue
        number = next(numbers)
        try:
            yield prompt_of(number, source, record, config, chats)
        except BadRecord as error:
            problem = str(error) if record.problem else f"{record.where}: {error}"
            if not config.skip_bad_records:
                raise UserError(f"{problem}; or pass over such with --skip-bad-records") from None
            yield Prompt(number, source, problem=problem)


def _records(source: Source, seed: int, again: bool) -> Iterator[Record]:
    """The records of a source, of long texts the beginning. again: and so on for ever."""
    empty = True
    while empty or again:
        empty = True
        for record in source.records(seed):
            if record.begins:
                empty = False
                yield record
        if empty:
            raise UserError(f"data {source.name} has no records: name a source with prompts in it")


def prompt_of(number: int, source: str, record: Record, config: Reading, chats: bool) -> Prompt:
    """What a text goes on from, of a record.

    chats: it is a user's words, where it is not a document.

    Raises:
        BadRecord: it is malformed.
    """
    if record.problem:
        raise BadRecord(record.problem)
    if record.tokens is not None:
        return Prompt(number, source, tokens=record.tokens[: config.prompt_tokens])
    fields = record.fields
    if fields.get("prompt") is not None and fields.get("completion") is None:
        fields = fields | {"completion": ""}
    form = find_form(fields, config.text_field)
    if isinstance(form, Instruction):
        form = form.as_chat() if chats else form.as_completion()
    if isinstance(form, Completion) and chats:
        form = Chat(messages_of(form.prompt))
    if isinstance(form, Completion):
        return Prompt(number, source, text=form.prompt, whole=True)
    if isinstance(form, Chat):
        if not chats:
            raise BadRecord(
                "a chat, which takes a chat template: give one with --chat-template, and no --form "
                "text"
            )
        return Prompt(number, source, _asked(form, config.system))
    return Prompt(number, source, text=form.text[: CHARACTERS * config.prompt_tokens])


def _asked(chat: Chat, system: str) -> list[dict[str, Any]]:
    """The messages up to the last one of the user."""
    last = max((i for i, turn in enumerate(chat.messages) if turn["role"] == "user"), default=None)
    if last is None:
        raise BadRecord("the user says nothing")
    messages = chat.messages[: last + 1]
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def beginning(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tokens: int
) -> tuple[list[int], str]:
    """Ids of what a text goes on from, and the text that these ids are.

    tokens: of a document, how many at most.
    """
    if prompt.tokens is not None:
        ids = prompt.tokens.tolist()
    else:
        ids = list(tokenizer(prompt.text, verbose=False).input_ids)
        ends = ids and ids[-1] == tokenizer.eos_token_id  # some tokenizers add it by themselves
        ids = ids[:-1] if ends else ids
    if prompt.whole:
        return ids, prompt.text
    ids = ids[:tokens]
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    while text.endswith("\ufffd") and ids:  # half a character
        ids = ids[:-1]
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return ids, text
