"""The fields that a request may have. OpenAI's others, and unknown ones, are refused by name."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from pydantic import BaseModel, ConfigDict, Field

from ee_tuning.config import Measure, Mode
from ee_tuning.serve.errors import Refused

TOP = 20  # likeliest tokens that may be asked for
ABSENT = {"max_pending"}  # of decoding, but not of single requests
# OpenAI's fields; what their types are takes milliseconds to find.
THEIRS = {*typing.get_type_hints(CompletionParams), *typing.get_type_hints(ChatParams)}
MOST = 128  # texts that one request may ask for
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Name = Annotated[str, Field(max_length=1000)]


class Body(BaseModel):
    """Of any route."""

    # What is not a field is looked at in `check_fields`, which knows OpenAI's.
    model_config = ConfigDict(
        strict=True, extra="allow", protected_namespaces=(), allow_inf_nan=False
    )
    model: Name | None = None


class StreamOptions(BaseModel):
    """What is streamed beside the text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(Body):
    """What completions and chats share: OpenAI's fields, vLLM's additions, and those of exits."""

    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: Name | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1000)] | None = None
    ignore_eos: bool | None = None

    mode: Mode | Literal["auto"] | None = None
    threshold: float | Annotated[str, Field(max_length=1000)] | dict[str, float] | None = None
    exit_layers: Annotated[list[TokenId], Field(min_length=1, max_length=1000)] | Name | None = None
    min_depth: TokenId | None = None
    measure: Measure | None = None
    lookup: bool | None = None
    return_exits: bool | None = None


Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionBody(Generation):
    """`/v1/completions`."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MOST)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None


class Part(BaseModel):
    """A part of what is said."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a chat. What is not a field may be there with null, as in replies."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As templates have it."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        found = {"role": self.role, "content": content}
        return found if self.name is None else found | {"name": self.name}


class ResponseFormat(BaseModel):
    """Text alone."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]


Messages = Annotated[list[Message], Field(min_length=1, max_length=10_000)]


class ChatBody(Generation):
    """`/v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    response_format: ResponseFormat | None = None


class TokenizeBody(Body):
    """`/tokenize`: a prompt, or a chat."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(Body):
    """`/detokenize`."""

    tokens: list[TokenId]


class LensBody(Body):
    """`/lens`: what every exit says after each token of a text, from the `first` on."""

    tokens: Ids
    first: Annotated[int, Field(ge=1)]


def check_fields(body: Body) -> None:
    """Refuse fields that are not known, or cannot be had.

    Raises:
        Refused: names the first one.
    """
    known = type(body).model_fields
    for name, value in (body.model_extra or {}).items():
        if value is None and name in THEIRS:
            continue
        if name in THEIRS or name in ABSENT:
            raise Refused(f"{name} cannot be had: leave it out", name)
        raise Refused(f"{name} is unknown; there are {', '.join(known)}", name)
    for message in getattr(body, "messages", None) or ():
        for name, value in (message.model_extra or {}).items():
            if value is not None and value != []:
                raise Refused(f"messages: {name} cannot be had: leave it out", "messages")


def explain(errors: typing.Sequence[Any]) -> Refused:
    """What pydantic says of a body, about the first field that it finds fault with."""
    # A number stands for the place in a body that is no JSON.
    places = [[part for part in error["loc"] if part != "body"] for error in errors]
    param = next((place[0] for place in places[:1] if place and isinstance(place[0], str)), None)
    said = [
        f"{error['msg']}"
        for place, error in zip(places, errors, strict=True)
        if param is None or place[:1] == [param]
    ]
    text = ", or ".join(dict.fromkeys(said)) or "not understood"
    whole = f"the body is not understood: {text}; it is JSON, and content-type: application/json"
    return Refused(f"{param}: {text}" if param else whole, param)
