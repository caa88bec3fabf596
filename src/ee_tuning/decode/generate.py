"""`generate`: prompts in, tokens out, around an `Engine` that the model keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ee_tuning.decode.arguments import Settings, as_row, prepare, read_prompts, said, warn_ignored
from ee_tuning.decode.engine import Engine, Request
from ee_tuning.decode.pipeline import Stage
from ee_tuning.decode.policy import active_layers, check_pending
from ee_tuning.decode.speculative import Token
from ee_tuning.errors import UserError

if TYPE_CHECKING:
    from ee_tuning.model import EarlyExitModel

# Room of an engine is a multiple of this, so that texts of about the same length share one.
ROOM = 256
ENGINES = 4  # kept by a model: one for each way to decode that is used in turns


@dataclass
class GenerateOutput(ModelOutput):
    """What `generate` returns, for B prompts of P tokens and N new ones.

    sequences: (B, P + N) int64, prompts and new tokens, then padding. exit_layers: (B, N) int64,
    the layer each new token left at, 0 where a text has ended. confidences: (B, N) fp32, how sure
    it was there.
    """

    sequences: Tensor | None = None
    exit_layers: Tensor | None = None
    confidences: Tensor | None = None


def generate(
    model: EarlyExitModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    compile: bool | None = None,
    on_token: Callable[[int, Token], None] | None = None,
    streamer: Any = None,
    return_dict_in_generate: bool | None = None,
    **kwargs: Any,
) -> GenerateOutput | Tensor:
    """Generate from prompts (B, P); `kwargs`: `Settings` and those of transformers' ``generate``.

    Every row decides for itself, and its tokens do not depend on its neighbours (in fp32: rounding
    may decide between tokens that are all but equally likely). A model that
    several processes have parts of, see `ee_tuning.decode.load_part`, is called on all of them
    alike, and gives the same on each.

    attention_mask: (B, P), 0 where a shorter prompt is padded on its left; default: leading
        padding tokens, unless they may end a text.
    compile: layers and exits, and capture passes as CUDA graphs; default: on CUDA. The first calls
        compile; `warm_up` does it ahead.
    on_token: called with the row and each settled `Token` before the streamer gets it.
    streamer: as in transformers, for one text.
    return_dict_in_generate: False, here or in ``generation_config``, gives the sequences alone.

    Raises:
        UserError: an unknown mode, measure or exit, a threshold outside [0, 1], an empty batch or
            prompt, one longer than the context, K/V that do not fit into memory, or what
            transformers refuses or cannot be had with early exits.
    """
    warn_ignored(kwargs)
    prompts = read_prompts(model, input_ids, attention_mask, kwargs)
    width = input_ids.shape[1]
    prepared = [prepare(model, ids, width - len(ids), **kwargs) for ids in prompts]
    requests = [request for requests, _ in prepared for request in requests]
    if streamer is not None and len(requests) > 1:
        raise UserError("a streamer takes one text: leave it out, or use on_token for a batch")
    # A length with the prompt is one with its padding, as transformers has it.
    room = min(request.max_length - len(request.ids) for request in requests)
    for request in requests:
        request.max_length = len(request.ids) + room
    rows = {request: row for row, request in enumerate(requests)}
    tokens: list[list[Token]] = [[] for _ in requests]
    engine = engine_for(model, requests, compile)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for request, token in engine.stream(requests):
        tokens[rows[request]].append(token)
        if on_token:
            on_token(rows[request], token)
        if streamer is not None:
            streamer.put(torch.tensor([token.id]))
    if streamer is not None:
        streamer.end()
    given = input_ids.repeat_interleave(len(requests) // len(prompts), 0)
    output = _output(given, tokens, prepared[0][1], model.backbone.device)
    if return_dict_in_generate is None:
        return_dict_in_generate = said(kwargs, "return_dict_in_generate")
    return output["sequences"] if return_dict_in_generate is False else output


def generate_batch(
    model: EarlyExitModel,
    prompts: Iterable[Any],
    *,
    slots: int = 16,
    capacity: int | None = None,
    compile: bool | None = None,
    **kwargs: Any,
) -> Iterator[tuple[int, GenerateOutput]]:
    """Generate from any number of prompts, `slots` at a time: (number, output) as each text ends.

    A text that ends frees its slot for the next prompt, which is asked for only then. Ending the
    iteration gives up what is in progress.

    prompts: token ids, as lists or tensors (P,); or what a tokenizer gives for one text; or dicts
        of ``input_ids`` and arguments that this prompt has for itself: a mode, a threshold, …
    capacity: tokens of a prompt with its text at most; default: the backbone's context. Where
        rotary frequencies change at a length (longrope), default: that; with more, all texts have
        those of long ones.
    kwargs: `Settings` and arguments of transformers' ``generate``, for all prompts. Their
        `exit_layers` and `max_pending` bound those of the single prompts.

    Raises:
        UserError: as `generate`. A prompt that cannot be had is refused by its number when its turn
            comes: the texts in progress end first, and no further prompt is asked for.
    """
    warn_ignored(kwargs)
    capacity = capacity or model.backbone.longest_text
    if not capacity:
        raise UserError("the backbone's config has no context length: give capacity")
    exits = active_layers(model, kwargs.get("exit_layers"))
    bound = kwargs.get("max_pending", Settings.max_pending)
    check_pending(bound)
    engine = _engine(model, exits, slots, capacity, bound, compile)
    numbers: dict[Request, tuple[int, list[Token]]] = {}

    def read(prompt: Any) -> list[Request]:
        own = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
        row, mask = as_row(own.pop("input_ids", None)), own.pop("attention_mask", None)
        given = kwargs | own
        mask = torch.ones_like(row) if mask is None else as_row(mask)
        (ids,) = read_prompts(model, row, mask, given)
        found = prepare(model, ids, **given)[0]
        for request in found:
            engine.check(request, capacity)
        return found

    def requests() -> Iterator[Request]:
        for number, prompt in enumerate(prompts):
            try:
                found = read(prompt)
            except UserError as error:
                raise UserError(f"prompt {number}: {error}") from error
            for request in found:
                numbers[request] = number, []
                yield request

    for request, token in engine.stream(requests()):
        number, tokens = numbers[request]
        tokens.append(token)
        if request.finished:
            del numbers[request]
            prompt = torch.tensor([request.ids])
            yield number, _output(prompt, [tokens], 0, model.backbone.device)


def warm_up(
    model: EarlyExitModel,
    *,
    slots: int = 1,
    capacity: int | None = None,
    compile: bool | None = None,
    **settings: Any,
) -> float:
    """Compile and capture what `generate` with these `Settings` will run; gives the seconds.

    slots: prompts at a time. capacity: as for `generate_batch`.
    """
    given = Settings(**settings)
    policy = given.policy(model)
    capacity = capacity or model.backbone.longest_text or ROOM
    engine = _engine(model, policy.exit_layers, slots, capacity, policy.max_pending, compile)
    return engine.warm_up([policy.measure])


def will_compile(model: EarlyExitModel, compile: bool | None) -> bool:
    """Whether decoding with this argument compiles.

    Raises:
        UserError: it cannot.
    """
    if not isinstance(compile, bool | None):
        raise UserError(f"compile is True, False or None, not {compile!r}")
    if compile is None:
        return model.backbone.device.type == "cuda" and model.mesh.tp == 1
    if compile and model.mesh.tp > 1:
        raise UserError("compile cannot be had with tp: sums between ranks do not compile")
    return compile


def engine_for(model: EarlyExitModel, requests: list[Request], compile: bool | None) -> Engine:
    """An engine in which all of `requests` have a slot."""
    policies = [request.policy for request in requests]
    exits = sorted({layer for policy in policies for layer in policy.exit_layers})
    pending = max(policy.max_pending for policy in policies)
    capacity = max(request.max_length for request in requests)
    backbone, original = model.backbone, model.backbone.original_context
    if backbone.is_long(capacity):
        long = [backbone.is_long(len(request.ids)) for request in requests]
        if not any(long):
            raise UserError(
                f"{capacity} tokens with the prompt are asked for, and a text that begins with "
                f"up to {original} ends there, where rotary frequencies change: ask for fewer"
            )
        if not all(long):
            raise UserError(
                f"prompts of up to {original} tokens and longer ones have other rotary "
                "frequencies: give them in calls of their own"
            )
    return _engine(model, exits, len(requests), capacity, pending, compile)


def _engine(
    model: EarlyExitModel,
    exit_layers: Sequence[int],
    slots: int,
    capacity: int,
    max_pending: int,
    compile: bool | None,
) -> Engine:
    """The smallest of the model's engines that has room; else a new one, which the model keeps.

    Captured graphs hold the addresses of weights, so other weights want another engine.
    """
    for name, number in (("slots", slots), ("capacity", capacity)):
        if not isinstance(number, int) or number < 1:
            raise UserError(f"{name} is {number!r}: give 1 or more")
    mesh, compile = model.mesh, will_compile(model, compile)
    end, long = model.backbone.end, model.backbone.is_long(capacity)
    if end and capacity > end:
        raise UserError(
            f"{capacity} tokens with the prompt are asked for, the backbone's positions go on for "
            f"{end} alone: ask for fewer"
        )
    weights = tuple(p.data_ptr() for p in model.parameters())
    device = model.backbone.device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    alike = (tuple(exit_layers), max_pending, compile, weights, cast, long)
    kept = [key for key in model.engines if key[0] == alike]
    fitting = [
        key for key in kept
        if key[1] >= slots and key[2] >= capacity and not model.engines[key].streams
    ]  # fmt: skip
    if fitting:
        key = min(fitting, key=lambda one: one[1] * one[2])
        engine = model.engines.pop(key)
    else:
        room = -(-capacity // ROOM) * ROOM
        longest = model.backbone.context if long else model.backbone.longest_text
        if longest and capacity <= longest < room:
            room = longest
        key = (alike, slots, room)
        for smaller in [one for one in kept if one[1] <= slots and one[2] <= room]:
            del model.engines[smaller]
        settings: dict[str, Any] = {"slots": slots, "capacity": room, "max_pending": max_pending}
        kind = Engine if mesh.pp == 1 else Stage

        def make() -> Engine:
            return kind(model, exit_layers, **settings, compile=compile)

        try:
            engine = mesh.on_all(make)
        except UserError:  # no room: that of the others may be enough
            model.engines.clear()
            engine = mesh.on_all(make)
    model.engines[key] = engine
    for oldest in list(model.engines)[:-ENGINES]:
        del model.engines[oldest]
    return engine


def _output(
    prompts: Tensor, tokens: list[list[Token]], padding: int, device: torch.device
) -> GenerateOutput:
    """prompts: (B, P); tokens: those of each row."""

    def table(values: list[list[Any]], fill: Any) -> Tensor:
        rows = [[*row, *[fill] * (longest - len(row))] for row in values]
        return torch.tensor(rows, device=device)

    longest = max(len(row) for row in tokens)
    new = table([[token.id for token in row] for row in tokens], padding)
    return GenerateOutput(
        sequences=torch.cat([prompts.to(device), new], dim=1),
        exit_layers=table([[token.exit_layer for token in row] for row in tokens], 0),
        confidences=table([[token.confidence for token in row] for row in tokens], 0.0),
    )
