"""Text in and out: a prompt as tokens, tokens as the text that each of them adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from ee_tuning.errors import UserError, first_line
from ee_tuning.exit_config import DRAFT, LOOKUP


class TextStream:
    """The text of one sequence, piece by piece: a character of several tokens comes when whole."""

    BEFORE = 6  # tokens that decide how the text after them begins: with a space or without

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip_special_tokens: bool,
        after: Sequence[int] = (),
    ) -> None:
        """after: tokens that come before the text and are none of it."""
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        # Tokenizers written in Python have none.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._ids = list(after)[-self.BEFORE :]
        self._stream = DecodeStream(self._ids, skip_special_tokens=skip_special_tokens)
        self._given = len(self._whole()) if self._ids else 0

    def put(self, ids: Sequence[int]) -> str:
        """What these tokens add to the text."""
        self._ids += ids
        if self._backend is None:
            text = self._whole()
            return "" if text.endswith("\ufffd") else self._new(text[self._given :])
        try:
            pieces = [self._stream.step(self._backend, token) for token in ids]
        except Exception:  # bytes that change what the text before them is: begin with it anew
            self._stream = DecodeStream(self._ids, skip_special_tokens=self._skips)
            return self._new(self._whole()[self._given :])
        return self._new("".join(piece for piece in pieces if piece))

    def end(self) -> str:
        """What still waits: an unfinished character, as the sign for one."""
        return self._new(self._whole()[self._given :])

    def _new(self, text: str) -> str:
        self._given += len(text)
        return text

    def _whole(self) -> str:
        if self._backend is None:
            return str(self._tokenizer.decode(self._ids, skip_special_tokens=self._skips))
        return self._backend.decode(self._ids, skip_special_tokens=self._skips)


# Told apart by every kind of eye, on light and on dark; as the playground's.
EARLY, MIDDLE, LATE = (230, 138, 46), (150, 150, 146), (70, 130, 220)
OF_DRAFTS = {DRAFT: "#a05ec8", LOOKUP: "#3c9664"}


def depth_colour(layer: int, depth: int) -> str:
    """From orange (early) over grey to blue (full depth), as ``#rrggbb``; purple for `DRAFT`, green
    for `LOOKUP`."""
    if layer in OF_DRAFTS:
        return OF_DRAFTS[layer]
    at = 2 * layer / depth
    (low, high), share = ((EARLY, MIDDLE), at) if at < 1 else ((MIDDLE, LATE), at - 1)
    return "#" + "".join(
        f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True)
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt; of an empty one the token that begins a text.

    Raises:
        UserError: it is no text in UTF-8, or empty and the tokenizer has no such token.
    """
    encoded: Any = tokenizer(_checked(prompt))
    if encoded.input_ids:
        return list(encoded.input_ids)
    if tokenizer.bos_token_id is None:
        raise UserError("the prompt is empty, and the tokenizer has no BOS token to begin with")
    return [tokenizer.bos_token_id]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation: bool = True
) -> list[int]:
    """Token ids of a chat, with the words with which the assistant is to go on.

    generation: whether it is; False leaves these words out.

    Raises:
        UserError: a turn is no text in UTF-8, or the chat template is missing or fails.
    """
    for message in messages:
        _checked(message["content"])
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template: leave --chat out, or give one with --chat-template"
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation, return_dict=True
        )
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template fails: {first_line(error)}") from error
    return list(encoded["input_ids"])


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python's stand-ins for bytes it could not read
        raise UserError("the prompt is not in UTF-8: convert it") from error
    return text
