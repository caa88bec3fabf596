"""From records to documents: token ids, and labels that say which tokens count in the loss.

The first of these that a record has decides:

* ``messages``: a chat; the tokens of the assistant count.
* ``prompt`` and ``completion``: the completion counts, end of text included.
* ``text``: everything counts, end of text included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypedDict

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from ee_tuning.data.readers import Record
from ee_tuning.errors import UserError
from ee_tuning.losses import IGNORED

CHUNK = 256  # texts tokenised at once: a fast tokenizer spreads them over the cores
FORMS = (("messages",), ("prompt", "completion"), ("text",))
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Document(TypedDict):
    """input_ids and labels, each (n,) int32; or a bad record's problem and no tokens."""

    input_ids: np.ndarray
    labels: np.ndarray
    problem: str


class BadRecord(Exception):
    """One record cannot be used; the message does not name the place."""


def document(ids: Any, labels: Any, problem: str = "") -> Document:
    """A `Document`; its first token never counts, since nothing before it predicts it."""
    labels = np.array(labels, dtype=np.int32)
    labels[:1] = IGNORED
    return {"input_ids": np.asarray(ids, dtype=np.int32), "labels": labels, "problem": problem}


def encode(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """One document per record, in order.

    Raises:
        UserError: a chat for a tokenizer without a usable chat template, or a tokenizer that
            cannot say which characters a token stands for.
    """
    stream = iter(records)
    while chunk := list(islice(stream, CHUNK)):
        yield from _encode_chunk(chunk, tokenizer)


def _encode_chunk(chunk: list[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    problems = [record.problem or _problem(record) for record in chunk]
    good = [record for record, problem in zip(chunk, problems, strict=True) if not problem]
    texts = _encode_texts([r for r in good if _form(r) == ("text",)], tokenizer)
    for record, problem in zip(chunk, problems, strict=True):
        if problem:
            yield document([], [], problem)
        elif record.tokens is not None:
            yield _stored(record, tokenizer)
        elif _form(record) == ("text",):
            yield next(texts)
        else:
            yield _encode_one(record, tokenizer)


def _stored(record: Record, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A document that is stored as tokens.

    Raises:
        UserError: the tokenizer does not have one of them.
    """
    ids = record.tokens
    assert ids is not None
    if len(ids) and not 0 <= ids.min() <= ids.max() < len(tokenizer):
        wrong = ids.max() if ids.max() >= len(tokenizer) else ids.min()
        raise UserError(
            f"{record.where}: token id {wrong} is outside the tokenizer's {len(tokenizer)} "
            "tokens: name the tokenizer it was made with"
        )
    return document(ids, ids)


def _form(record: Record) -> tuple[str, ...] | None:
    has = {name for name, value in record.fields.items() if value is not None}
    return next((form for form in FORMS if has.issuperset(form)), None)


def _problem(record: Record) -> str:
    """Why the fields of `record` cannot be used, or nothing."""
    form = _form(record)
    if record.tokens is not None:
        return ""
    if form is None:
        found = ", ".join(record.fields) or "none"
        return (
            f"{record.where}: fields found: {found}; wanted: messages, prompt and completion, "
            "or text"
        )
    if form == ("messages",):
        usable, wanted = _is_chat(record.fields["messages"]), "a list of {role, content}"
    else:
        usable, wanted = all(_is_text(record.fields[name]) for name in form), "valid text"
    return "" if usable else f"{record.where}: {' and '.join(form)} must be {wanted}"


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell but UTF-8 cannot
        return False


def _is_chat(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    turns = [turn for turn in value if isinstance(turn, dict) and {"role", "content"} <= {*turn}]
    return len(turns) == len(value) and all(
        _is_text(turn["role"])
        and (not isinstance(turn["content"], str) or _is_text(turn["content"]))
        for turn in turns
    )


def _encode_texts(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    # A tokenizer refuses an empty batch. Special tokens are its own choice, hence a bos or not.
    texts = [record.fields["text"] for record in records]
    encoded = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    for ids in encoded:
        yield document(*_with_eos(ids, list(ids), tokenizer))


def _with_eos(
    ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """End a document with the tokenizer's end of text, if it has one, and let that count."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return ids, labels
    if ids and ids[-1] == eos:  # some tokenizers add it by themselves
        return ids, [*labels[:-1], eos]
    return [*ids, eos], [*labels, eos]


def _encode_one(record: Record, tokenizer: PreTrainedTokenizerBase) -> Document:
    try:
        if _form(record) == ("messages",):
            return _encode_chat(record, tokenizer)
        return _encode_completion(record.fields["prompt"], record.fields["completion"], tokenizer)
    except BadRecord as error:
        return document([], [], f"{record.where}: {error}")


def _encode_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> Document:
    text = prompt + completion
    ids, labels = _encode_spans(text, [(len(prompt), len(text))], tokenizer, special=True)
    return document(*_with_eos(ids, labels, tokenizer))


def _encode_spans(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, special: bool
) -> tuple[list[int], list[int]]:
    """Tokens of `text`; those whose last character lies in a span of characters are labelled.

    The last and not the first: a token may begin with the space that ends a prompt.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} gives no character offsets, which chats and "
            "completions need: use its fast version, or records with text"
        )
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
    counts = np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        counts |= (ends > start) & (ends <= stop)
    return ids.tolist(), np.where(counts, ids, IGNORED).tolist()


def _encode_chat(record: Record, tokenizer: PreTrainedTokenizerBase) -> Document:
    messages = record.fields["messages"]
    if not tokenizer.chat_template:
        raise UserError(
            f"{record.where}: messages need a chat template and the tokenizer "
            f"{tokenizer.name_or_path} has none: use an instruction-tuned model's tokenizer"
        )
    try:
        if GENERATION.search(tokenizer.get_chat_template()):
            return _encode_marked_chat(messages, tokenizer)
        text, spans = _assistant_spans(record.where, messages, tokenizer)
    except (jinja2.TemplateError, TypeError) as error:
        raise BadRecord(f"the chat template refuses these messages ({error})") from None
    return document(*_encode_spans(text, spans, tokenizer, special=False))


def _encode_marked_chat(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> Document:
    """The template itself marks the assistant's tokens, with {% generation %}."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = np.array(encoded["input_ids"])
    return document(ids, np.where(np.array(encoded["assistant_masks"]) == 1, ids, IGNORED))


def _assistant_spans(
    where: str, messages: list[dict], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and the spans of characters a model would have to generate."""

    def render(count: int, prompt: bool) -> str:
        text: Any = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )
        return text

    text, spans = render(len(messages), False), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, True), render(i + 1, False)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{where}: the chat template writes turns differently once others follow, so the "
                "assistant's text cannot be told apart: use a template with {% generation %}"
            )
        spans.append((len(before), len(after)))
    return text, spans
