"""Text in and out: a prompt as tokens, tokens as the text that each of them adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ee_tuning.errors import UserError, first_line
from ee_tuning.exit_config import DRAFT, LOOKUP


class TextStream:
    """The text of one sequence, piece by piece: a character of several tokens comes when whole.

    What tokens add to a text is what they are behind a few others, less what these alone are.
    """

    # Tokens that decide how the text after them begins: with a space or without. As many at least,
    # where they do not begin within a character, of up to four bytes; at most, where all do, or
    # are special and have no text.
    BEFORE, MORE, MOST = 6, 4, 64

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip_special_tokens: bool,
        after: Sequence[int] = (),
    ) -> None:
        """after: tokens that come before the text and are none of it."""
        # Tokenizers written in Python have no other one behind them.
        self._decoder = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._skips = skip_special_tokens
        self._ids = list(after)  # the last ones that were said, and those that were not
        self._said = ""  # of these
        self._forget()

    def put(self, ids: Sequence[int]) -> str:
        """What these tokens add to the text."""
        self._ids += ids
        text = self._text(self._ids)
        whole = text.rstrip("\ufffd")  # what is left may be a character that has begun
        new = self._new(whole)
        if whole == text:
            self._forget()
        return new

    def end(self) -> str:
        """What still waits: an unfinished character, as the sign for one."""
        return self._new(self._text(self._ids))

    def _new(self, text: str) -> str:
        """What a text of all tokens adds to what was said."""
        same = len(self._said)
        while not text.startswith(self._said[:same]):  # what follows was no character yet
            same -= 1
        new = text[same:]
        self._said = text if new else self._said
        return new

    def _forget(self) -> None:
        """Keep the last tokens that were said alone."""
        for number in range(self.BEFORE, self.BEFORE + self.MORE):
            last = self._ids[-number:]
            said = self._text(last)
            if said and not said.startswith("\ufffd"):
                break
        else:
            last = self._ids[-self.MOST :]
            said = self._text(last)
        self._ids, self._said = last, said

    def _text(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(self._decoder.decode(ids, skip_special_tokens=self._skips))


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
