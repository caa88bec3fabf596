"""From records to documents: token ids, and which of them count in the loss."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ee_tuning.config import ReadingConfig
from ee_tuning.data.chats import Spans, marked, rendered, with_template
from ee_tuning.data.forms import BadRecord, Chat, Completion, Form, Instruction, Text, find_form
from ee_tuning.data.readers import PIECE, Record, pieces
from ee_tuning.errors import UserError

CHUNK = 256  # texts tokenised at once
CHUNK_CHARACTERS = 4 * PIECE
WITH_OFFSETS = PIECE  # characters at once where offsets are wanted, which take far more memory


class Document(NamedTuple):
    """ids (n,) int32; counts (n,) bool: which of them are learned, never the first."""

    ids: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """A record as documents: one, or several of a chat; or its problem and none."""

    record: Record
    documents: list[Document] = field(default_factory=list)
    problem: str = ""


class Written(NamedTuple):
    """A text of which the characters in `spans` are learned. alone: as it is, and not as a chat
    template wrote it: it has what the tokenizer puts around a text."""

    text: str
    spans: Spans
    alone: bool


def document(ids: Any, counts: Any) -> Document:
    """A `Document`; its first token never counts, since nothing before it predicts it."""
    counts = np.array(counts, dtype=bool)
    counts[:1] = False
    return Document(np.asarray(ids, dtype=np.int32), counts)


class Encoder:
    """Makes documents with `tokenizer`, as `reading` says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reading: ReadingConfig) -> None:
        self.tokenizer = with_template(tokenizer, reading.chat_template)
        self.text_field = reading.text_field
        # Slow tokenizers and old ones do not know the argument.
        self.plain = {"split_special_tokens": True} if reading.control_as_text else {}
        self._edges: tuple[list[int], list[int]] | None = None

    def identity(self) -> Any:
        """Differs where a record may become other documents, as a text."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            model = tokenizer.backend_tokenizer.to_str()
        else:
            vocabulary = sorted(tokenizer.get_vocab().items())
            model = repr((type(tokenizer), vocabulary, tokenizer.init_kwargs))
        template = tokenizer.chat_template
        return model, tokenizer.special_tokens_map, template, self.text_field, self.plain

    def encode(self, records: Iterable[Record], skip: int = 0) -> Iterator[Encoded]:
        """The documents of every record, or piece of a long text, in order, but the first `skip`.

        Raises:
            UserError: a chat for a tokenizer without a chat template, a tokenizer that cannot say
                which characters a token stands for, or stored tokens that it does not have.
        """
        chunk: list[tuple[Record, Form | None]] = []
        characters = 0
        items = (item for record in records for item in self._understood(record))
        for record, form in islice(items, skip, None):
            chunk.append((record, form))
            characters += len(form.text) if isinstance(form, Text) else 0
            if len(chunk) == CHUNK or characters >= CHUNK_CHARACTERS:
                yield from self._encode_chunk(chunk)
                chunk, characters = [], 0
        yield from self._encode_chunk(chunk)

    def _understood(self, record: Record) -> Iterator[tuple[Record, Form | None]]:
        """The record and what it means, piece by piece if it is a long text; or its problem."""
        if record.problem or record.tokens is not None:
            yield record, None
            return
        try:
            form = find_form(record.fields, self.text_field)
        except BadRecord as error:
            yield replace(record, problem=f"{record.where}: {error}"), None
            return
        if not isinstance(form, Text) or len(form.text) <= 2 * PIECE:
            yield record, form
            return
        for piece in pieces(record.where, io.StringIO(form.text, newline="")):
            yield piece, Text(piece.fields["text"])

    def _encode_chunk(self, chunk: list[tuple[Record, Form | None]]) -> Iterator[Encoded]:
        texts = [(record, form) for record, form in chunk if isinstance(form, Text)]
        whole = self._ids([form.text for record, form in texts if record.begins and record.ends])
        parts = [form.text for record, form in texts if not (record.begins and record.ends)]
        bare = self._ids(parts, add_special_tokens=False)
        read = [self._read(record, form) for record, form in chunk]
        written = self._documents([part for found, _ in read for part in found])
        for (record, form), (found, problem) in zip(chunk, read, strict=True):
            if not isinstance(form, Text):
                yield Encoded(record, [next(written) for _ in found], problem)
            elif record.begins and record.ends:
                yield Encoded(record, [self._learned(next(whole))])
            else:
                yield Encoded(record, [self._piece(record, next(bare))])

    def _ids(self, texts: list[str], **more: Any) -> Iterator[list[int]]:
        # A tokenizer refuses an empty batch. Special tokens are its own choice, hence a bos or not.
        if texts:
            more |= self.plain
            yield from self.tokenizer(texts, verbose=False, **more)["input_ids"]

    def _learned(self, ids: list[int]) -> Document:
        return document(*self._with_eos(ids, [True] * len(ids)))

    def _piece(self, record: Record, ids: list[int]) -> Document:
        """A piece of a long text: only the first and the last have what the tokenizer adds."""
        if self._edges is None:
            self._edges = self._around()
        front, back = self._edges
        ids = (front if record.begins else []) + ids
        return self._learned(ids + back) if record.ends else document(ids, [True] * len(ids))

    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        bare, full = next(self._ids(["a"], add_special_tokens=False)), next(self._ids(["a"]))
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def _with_eos(self, ids: list[int], counts: list[bool]) -> tuple[list[int], list[bool]]:
        """End a document with the tokenizer's end of text, if it has one, and let that count."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            return ids, counts
        if ids and ids[-1] == eos:  # some tokenizers add it by themselves
            return ids, [*counts[:-1], True]
        return [*ids, eos], [*counts, True]

    def _read(self, record: Record, form: Form | None) -> tuple[list[Document | Written], str]:
        """What a record comes to that is no plain text; or nothing, and its problem, if any."""
        if record.problem or isinstance(form, Text):
            return [], record.problem
        if record.tokens is not None:
            return [self._stored(record)], ""
        if isinstance(form, Instruction):
            form = form.as_chat() if self.tokenizer.chat_template else form.as_completion()
        if isinstance(form, Completion):
            text = form.prompt + form.completion
            return [Written(text, [(len(form.prompt), len(text))], True)], ""
        assert isinstance(form, Chat)
        try:
            return self._chat(record, form), ""
        except BadRecord as error:
            return [], f"{record.where}: {error}"

    def _stored(self, record: Record) -> Document:
        """A document that is stored as tokens.

        Raises:
            UserError: the tokenizer does not have one of them.
        """
        ids, size = record.tokens, len(self.tokenizer)
        assert ids is not None
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            wrong = ids.max() if ids.max() >= size else ids.min()
            raise UserError(
                f"{record.where}: token id {wrong} is outside the tokenizer's {size} tokens: name "
                "the tokenizer it was made with"
            )
        return document(ids, np.ones(len(ids)))

    def _chat(self, record: Record, chat: Chat) -> list[Document | Written]:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{record.where}: messages need a chat template and the tokenizer "
                f"{self.tokenizer.name_or_path} has none: use an instruction-tuned model's "
                "tokenizer, or give one with --chat-template"
            )
        found = marked(chat, self.tokenizer)
        if found:
            return [document(*found)]
        return [Written(text, spans, False) for text, spans in rendered(chat, self.tokenizer)]

    def _documents(self, parts: list[Document | Written]) -> Iterator[Document]:
        """Those of `parts`, in order. Of a text the tokens whose last character lies in a span
        count: the last and not the first, as a token may begin with the space that ends a prompt.
        """
        texts = [part for part in parts if isinstance(part, Written)]
        ids_of = {
            alone: self._ids_and_ends([part.text for part in texts if part.alone is alone], alone)
            for alone in (False, True)
        }
        for part in parts:
            if isinstance(part, Document):
                yield part
                continue
            ids, ends = next(ids_of[part.alone])
            counts = np.zeros(len(ends), dtype=bool)
            for start, stop in part.spans:
                counts |= (ends > start) & (ends <= stop)
            yield document(*(self._with_eos(ids, counts.tolist()) if part.alone else (ids, counts)))

    def _ids_and_ends(
        self, texts: list[str], alone: bool
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Of each text its tokens, and behind which of its characters each ends, (n,) int64."""
        if texts and not self.tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path} gives no character offsets, which "
                "chats and completions need: use its fast version, or records with text"
            )
        more: dict[str, Any] = self.plain if alone else {}
        for some in _batches(texts):
            found = self.tokenizer(
                some, return_offsets_mapping=True, add_special_tokens=alone, verbose=False, **more
            )
            for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
                yield ids, np.array([end for _, end in offsets], dtype=np.int64)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts to be tokenised at once, on all cores."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= WITH_OFFSETS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
