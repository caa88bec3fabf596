"""Text in and out: a prompt as tokens, tokens as the text that each of them adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ee_tuning.errors import UserError, first_line
from ee_tuning.exit_config import DRAFT, LOOKUP

LONGEST = 4  # bytes of a character


class TextStream:
    """The text of one sequence, piece by piece: a character of several tokens comes when whole.

    What tokens add to a text is what they are behind a few others, less what these alone are.
    """

    BEFORE = 6  # tokens that decide how the text after them begins: with a space or without

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
        self._said = 0  # characters of these
        if not self._forgets():
            self._said = len(self._text(self._ids))

    def put(self, ids: Sequence[int]) -> str:
        """What these tokens add to the text."""
        self._ids += ids
        text = self._text(self._ids)
        return "" if text.endswith("\ufffd") else self._say(text)

    def end(self) -> str:
        """What still waits: an unfinished character, as the sign for one."""
        return self._say(self._text(self._ids))

    def _say(self, text: str) -> str:
        """What a text of all tokens adds to what was said."""
        new, self._said = text[self._said :], len(text)
        self._forgets()
        return new

    def _forgets(self) -> bool:
        """Whether the last few that were said are enough: not if they are special and have no text,
        or what follows would be taken for the beginning of one; nor from within a character."""
        for number in range(self.BEFORE, self.BEFORE + LONGEST):
            last = self._ids[-number:]
            if (before := self._text(last)) and not before.startswith("\ufffd"):
                self._ids, self._said = last, len(before)
                return True
        return False

    def _text(self, ids: Sequence[int]) -> str:
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
