"""What the fields of a record mean. The first of `FORMS` whose fields it has decides."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

ROLES = {  # of ShareGPT, as chat templates call them
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "function_call": "assistant", "function_response": "tool",
    "observation": "tool",
}  # fmt: skip


class BadRecord(Exception):
    """One record cannot be used; the message does not name the place."""


@dataclass(frozen=True)
class Text:
    """Everything is learned, end of text included."""

    text: str


@dataclass(frozen=True)
class Completion:
    """`completion` is learned, end of text included."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """The turns of the assistant are learned.

    messages: as a chat template takes them.
    tools: as it takes them, too.
    learned_from: the first message that may be learned.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    learned_from: int = 0


@dataclass(frozen=True)
class Instruction:
    """`output` is learned, after `instruction` and perhaps `input`, the material to work on."""

    instruction: str
    input: str
    output: str

    def as_chat(self) -> Chat:
        """For tokenizers with a chat template."""
        asked = "\n\n".join(filter(None, (self.instruction, self.input)))
        turns = zip(("user", "assistant"), (asked, self.output), strict=True)
        return Chat([{"role": role, "content": content} for role, content in turns])

    def as_completion(self) -> Completion:
        """For tokenizers without: the prompt that Alpaca was tuned with."""
        paired = ", paired with an input that provides further context" if self.input else ""
        given = f"### Input:\n{self.input}\n\n" if self.input else ""
        return Completion(
            f"Below is an instruction that describes a task{paired}. Write a response that "
            f"appropriately completes the request.\n\n### Instruction:\n{self.instruction}\n\n"
            f"{given}### Response:\n",
            self.output,
        )


Form = Text | Completion | Chat | Instruction


def find_form(fields: dict[str, Any], text_field: str = "text") -> Form:
    """What `fields` mean.

    text_field: the name of the field with a plain text; other than ``text``, it comes first.

    Raises:
        BadRecord: nothing that is known, or a field with something else in it than what is wanted.
    """
    given = {name for name, value in fields.items() if value is not None}
    named: list[tuple[tuple[str, ...], Maker]] = []
    if text_field != "text":
        named = [((text_field,), partial(_text, name=text_field))]
    for names, make in (*named, *FORMS):
        if given.issuperset(names):
            return make(fields)
    wanted = [" and ".join(names) for names, _ in (*named, *FORMS)]
    found = [name if name in given else f"{name} (null)" for name in fields]
    raise BadRecord(
        f"fields found: {', '.join(found) or 'none'}; wanted: {', '.join(wanted[:-1])}, "
        f"or {wanted[-1]}"
    )


def _text(fields: dict[str, Any], name: str = "text") -> Text:
    return Text(_valid(fields[name], name))


def _completion(fields: dict[str, Any]) -> Completion | Chat:
    """Each may be a text or messages; with messages on either side the whole is a chat."""
    prompt, completion = fields["prompt"], fields["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        both = "prompt and completion"
        return Completion(_valid(prompt, both), _valid(completion, both))
    before = _messages(prompt, "prompt", "user")
    return Chat(
        before + _messages(completion, "completion", "assistant"), _tools(fields), len(before)
    )


def _instruction(fields: dict[str, Any]) -> Instruction:
    names = ("instruction", "input", "output")
    texts = (fields.get(name) if fields.get(name) is not None else "" for name in names)
    return Instruction(*(_valid(text, name) for text, name in zip(texts, names, strict=True)))


def _chat(fields: dict[str, Any], name: str) -> Chat:
    messages = _messages(fields[name], name)
    system = fields.get("system")
    if name == "conversations" and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _valid(system, "system")}, *messages]
    return Chat(messages, _tools(fields))


def _messages(value: Any, name: str, role: str = "") -> list[dict[str, Any]]:
    """The turns of a chat; `role` is whose a plain text is, if that may be one."""
    if role and isinstance(value, str):
        return [{"role": role, "content": _valid(value, name)}]
    value, found = _parsed(value), list[dict[str, Any]]()
    keys = "{from, value}" if name == "conversations" else "{role, content}"
    if not isinstance(value, list) or not value:
        raise BadRecord(
            f"{name} must be a list of {keys} with texts in them, not {reprlib.repr(value)}"
        )
    for number, one in enumerate(value, start=1):
        turn = _turn(one)
        if turn is None:
            raise BadRecord(
                f"{name} must be a list of {keys} with texts in them, and the {number}. is "
                f"{reprlib.repr(one)}"
            )
        found.append(turn)
    return found


def messages_of(question: str) -> list[dict[str, Any]]:
    """A chat in which the user has said something."""
    return [{"role": "user", "content": question}]


def _turn(turn: Any) -> dict[str, Any] | None:
    """A turn with ``role`` and ``content``, whatever it calls them; None if it is none."""
    if not isinstance(turn, dict):
        return None
    turn = _without_nothing(turn)
    if "from" in turn and "role" not in turn:
        role = turn.pop("from")
        turn["role"] = ROLES.get(role, role) if isinstance(role, str) else role
    if "value" in turn and "content" not in turn:
        turn["content"] = turn.pop("value")
    content = turn.get("content", "" if "tool_calls" in turn else None)
    usable = isinstance(content, list) or _is_text(content)
    return {**turn, "content": content} if usable and _is_text(turn.get("role")) else None


def _tools(fields: dict[str, Any]) -> list[Any] | None:
    tools = _without_nothing(_parsed(fields.get("tools")))
    if tools is not None and not isinstance(tools, list):
        raise BadRecord("tools must be a list")
    return tools or None


def _parsed(value: Any) -> Any:
    """What a text that holds JSON says: tables keep nested values so."""
    try:
        return json.loads(value) if isinstance(value, str) and value else value
    except (ValueError, RecursionError):
        return value


def _without_nothing(value: Any) -> Any:
    """`value` without keys that have none: Arrow gives all objects of a column the same keys."""
    if isinstance(value, dict):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value


def _valid(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{name} must be a string, not {reprlib.repr(value)}")
    if not _is_text(value):
        raise BadRecord(f"{name} has half a surrogate pair in it, which is no character")
    return value


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell but UTF-8 cannot
        return False


Maker = Callable[[dict[str, Any]], Form]
FORMS: tuple[tuple[tuple[str, ...], Maker], ...] = (
    (("messages",), partial(_chat, name="messages")),
    (("conversations",), partial(_chat, name="conversations")),
    (("prompt", "completion"), _completion),
    (("instruction", "output"), _instruction),
    (("text",), _text),
)
