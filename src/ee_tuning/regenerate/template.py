"""What a tokenizer's chat template says of turns: found by rendering, nothing is known ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ee_tuning.data.chats import REFUSALS
from ee_tuning.decode.sequences import never
from ee_tuning.errors import UserError, first_line

QUESTION, ANSWER = "Zq7question", "Zq7answer"  # words that no template has
TAIL = 8  # tokens more than the mark has, among which it is looked for


@dataclass(frozen=True)
class Template:
    """How a chat of one question looks.

    before: ids up to the user's words. ends: tokens that end a turn. mark: text that ends the
    user's, where that is not done by a token of its own.
    """

    before: list[int]
    ends: frozenset[int]
    mark: str = ""


def read_template(tokenizer: PreTrainedTokenizerBase, system: str, ends: set[int]) -> Template:
    """The template of a tokenizer that has one.

    system: a system prompt, or nothing. ends: tokens that end a text in any case.

    Raises:
        UserError: it fails, does not show the user's words as they are, or begins with them.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": QUESTION})
    before, between = _around(QUESTION, _render(tokenizer, messages, asks=True))
    answered = [*messages, {"role": "assistant", "content": ANSWER}]
    _, after = _around(ANSWER, _render(tokenizer, answered, asks=False))
    first = _ids(tokenizer, before)
    if not first and tokenizer.bos_token_id is not None:
        first = [tokenizer.bos_token_id]
    if not first:
        raise UserError(
            "the chat template begins with the user's words, and the tokenizer has no BOS token: "
            "there is nothing to begin from; give prompts with --data"
        )
    own = _own_token(tokenizer, between)
    turn_ends = {end for end in (own, _own_token(tokenizer, after)) if end is not None}
    mark = "" if own is not None else (between.strip().splitlines() or [""])[0].strip()
    return Template(first, frozenset(ends | turn_ends), mark)


def ends_by_mark(
    tokenizer: PreTrainedTokenizerBase, template: Template, start: int
) -> Callable[[Sequence[int], int], bool]:
    """Whether the first so many ids end a question by the template's mark; start: where the
    question begins."""
    if not template.mark:
        return never
    most = len(_ids(tokenizer, template.mark)) + TAIL

    def stops(ids: Sequence[int], length: int) -> bool:
        last = ids[max(start, length - most) : length]
        return template.mark in str(tokenizer.decode(list(last)))

    return stops


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], asks: bool) -> str:
    try:
        text: Any = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asks
        )
    except REFUSALS as error:
        raise UserError(f"the tokenizer's chat template fails: {first_line(error)}") from error
    return text


def _around(word: str, text: str) -> tuple[str, str]:
    if text.count(word) != 1:
        raise UserError(
            "the chat template does not show what a turn says as it is, once: give another one "
            "with --chat-template, or use --form text"
        )
    before, _, after = text.partition(word)
    return before, after


def _own_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The token that `text` begins with, if it stands for nothing but itself."""
    ids = _ids(tokenizer, text.lstrip())
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return ids[0] if ids and ids[0] in special else None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []
