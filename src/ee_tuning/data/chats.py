"""From a chat to documents: what a model would have to generate is what counts."""

from __future__ import annotations

import copy
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from ee_tuning.data.forms import BadRecord, Chat
from ee_tuning.errors import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, RecursionError)  # of a template
Spans = list[tuple[int, int]]  # (start, stop) of the characters that count


def with_template(tokenizer: PreTrainedTokenizerBase, file: str) -> PreTrainedTokenizerBase:
    """`tokenizer` with the chat template in `file`; the same one if `file` is empty.

    Raises:
        UserError: there is no such file, or what it holds is no template.
    """
    if not file:
        return tokenizer
    try:
        template = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not in UTF-8"
        raise UserError(f"chat template {file} cannot be read: {why}; check the path") from None
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template {file}, line {error.lineno}: {error.message}") from None
    except REFUSALS:
        pass  # of this one chat: others may be as it wants them
    return tokenizer


def marked(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], np.ndarray] | None:
    """Token ids and which of them count, (n,) bool, if the template says so with {% generation %}.

    Raises:
        BadRecord: the template refuses the messages.
    """
    try:
        template = tokenizer.get_chat_template(tools=chat.tools)
        if not GENERATION.search(template):
            return None
        encoded: Any = tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True
        )
    except REFUSALS as error:
        raise _refused(error) from None
    counts = np.array(encoded["assistant_masks"]) == 1
    turns = np.cumsum(np.diff(counts, prepend=False) & counts)
    given = sum(turn["role"] == "assistant" for turn in chat.messages[: chat.learned_from])
    return encoded["input_ids"], counts & (turns > given)


def rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, Spans]]:
    """The chat as text, and what of it counts.

    Templates that write a turn in another way once others follow, as those do that leave out
    earlier thoughts or end a text with a mark of its own, give a text per turn of the assistant:
    the chat up to there, of which that turn counts, as the model sees and writes it.

    Raises:
        BadRecord: the template refuses the messages, or hides where a turn begins.
    """

    def render(count: int, prompt: bool) -> str:
        text: Any = tokenizer.apply_chat_template(
            chat.messages[:count], tools=chat.tools, tokenize=False, add_generation_prompt=prompt
        )
        return text

    numbers = [i for i, turn in enumerate(chat.messages) if turn["role"] == "assistant"]
    try:
        text = render(len(chat.messages), False)
        last = len(chat.messages) - 1  # most chats have one turn, and this takes its time
        turns = [
            (i, render(i, True), text if i == last else render(i + 1, False))
            for i in numbers
            if i >= chat.learned_from
        ]
        if all(text.startswith(after) and after.startswith(before) for _, before, after in turns):
            return [(text, [(len(before), len(after)) for _, before, after in turns])]
        return [
            (after, [(_start(before, after, render(i, False)), len(after))])
            for i, before, after in turns
        ]
    except REFUSALS as error:
        raise _refused(error) from None


def _start(before: str, after: str, plain: str) -> int:
    """Where in `after` the last turn begins.

    before, plain: the chat up to there, with and without the words that ask for the turn. If these
    open a thought that the turn does not have, the turn begins where the two part.
    """
    if after.startswith(before):
        return len(before)
    if not after.startswith(plain):
        raise BadRecord(
            "the chat template writes earlier turns otherwise in every position, so the "
            "assistant's text cannot be told apart: give one with {% generation %} by "
            "--chat-template"
        )
    pairs = zip(before, after, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _refused(error: Exception) -> BadRecord:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return BadRecord(f"the chat template refuses these messages ({reason})")
