"""`generate`: prompts in, tokens out, around an engine that is kept for the model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ee_tuning.config import Leaving
from ee_tuning.decode.arguments import (
    as_row,
    read_leaving,
    read_prompts,
    said,
    to_requests,
    warn_ignored,
)
from ee_tuning.decode.certified import with_certified
from ee_tuning.decode.engines import ROOM, AnyEngine, engine_for, engines_of
from ee_tuning.decode.sampling import Token
from ee_tuning.decode.sequences import Request
from ee_tuning.decode.settings import (
    POLICIES,
    Policy,
    active_layers,
    check_mode,
    check_pending,
    make_policy,
)
from ee_tuning.devices import sent
from ee_tuning.errors import Notice, UserError
from ee_tuning.exit_config import LOOKUP
from ee_tuning.model import Network
from ee_tuning.passes.draws import NOTHING


@dataclass
class GenerateOutput(ModelOutput):
    """What `generate` returns, for B prompts of P tokens and N new ones.

    sequences: (B, P + N) int64, prompts and new tokens, then padding. exit_layers: (B, N) int64,
    the layer each new token left at, 0 for a kept draft of a draft exit, and where a text has
    ended, -1 for a kept one from the text itself (`lookup`). confidences: (B, N) fp32, how sure it
    was there; of -1 the end, which kept it.
    """

    sequences: Tensor | None = None
    exit_layers: Tensor | None = None
    confidences: Tensor | None = None


class Watcher(Protocol):
    """Who looks on: see `ee_tuning.calibrate.audit.Audit`."""

    def policy(self, policy: Policy) -> Policy:
        """That of a new request, or one in its place."""

    def take(self, request: Request, token: Token) -> None:
        """A token of a request is settled."""


def generate(
    model: Network,
    input_ids: Tensor,
    leaving: Leaving | None = None,
    *,
    attention_mask: Tensor | None = None,
    compile: bool | None = None,
    audit: Watcher | None = None,
    on_token: Callable[[int, Token], None] | None = None,
    streamer: Any = None,
    return_dict_in_generate: bool | None = None,
    **kwargs: Any,
) -> GenerateOutput | Tensor:
    """Generate from prompts (B, P); `kwargs`: those of `leaving` and of transformers' ``generate``.

    Every row decides for itself, and its tokens do not depend on its neighbours, nor greedy ones of
    mode ``speculative`` on the drafts (where `ee_tuning.invariant.Invariant` says that this cannot
    be had, rounding may decide between tokens that are all but equally likely). A model that
    several processes have parts of, see `ee_tuning.decode.load_part`, is called on all of them
    alike, and gives the same on each. Calls from several threads take turns, one whole call after
    another.

    leaving: where tokens leave; `kwargs` change single fields of it.
    attention_mask: (B, P), 0 where a shorter prompt is padded on its left; default: leading
        padding tokens, unless they may end a text.
    compile: layers and exits, and capture passes as CUDA graphs; default: on CUDA. The first calls
        compile; `warm_up` does it ahead.
    audit: of calibrated thresholds.
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
    made: dict[str, Policy] = {}
    ask = partial(to_requests, model, leaving=leaving, policies=made, **kwargs)
    with engines_of(model).turn:
        read = [ask(ids=ids, padded=input_ids.shape[1] - len(ids)) for ids in prompts]
        requests = [request for own, _ in read for request in own]
        if streamer is not None and len(requests) > 1:
            raise UserError("a streamer takes one text: leave it out, or use on_token for a batch")
        # A length with the prompt is one with its padding, as transformers has it.
        room = min(request.max_length - len(request.ids) for request in requests)
        for request in _audited(requests, audit):
            request.max_length = len(request.ids) + room
        with engine_for(model, requests, compile) as engine:
            if streamer is not None:
                streamer.put(input_ids.cpu())
            tokens = _texts(engine, requests, audit, on_token, streamer)
    _check_context(model, requests, tokens)
    given = input_ids[:, None].expand(-1, len(requests) // len(prompts), -1).flatten(0, 1)
    output = _output(given, tokens, read[0][1], model.backbone.device)
    if return_dict_in_generate is None:
        return_dict_in_generate = said(kwargs, "return_dict_in_generate")
    return output["sequences"] if return_dict_in_generate is False else output


def _check_context(
    model: Network, requests: Sequence[Request], tokens: Sequence[Sequence[Token]]
) -> None:
    """Warn of texts that went beyond the backbone's context. tokens: of each, the new ones."""
    context = model.backbone.context
    longest = max(len(one.ids) + len(own) for one, own in zip(requests, tokens, strict=True))
    if context and longest > context:
        warnings.warn(
            f"a text has {longest} tokens, the backbone's context is {context}: what it says "
            "beyond may make no sense",
            Notice,
            stacklevel=4,
        )


def _audited(requests: list[Request], audit: Watcher | None) -> list[Request]:
    """`requests`, some of them with another policy."""
    for request in requests if audit is not None else ():
        request.policy = audit.policy(request.policy)  # type: ignore[union-attr]
    return requests


def _watched(
    tokens: Iterator[tuple[Request, Token]], audit: Watcher | None
) -> Iterator[tuple[Request, Token]]:
    """`tokens`, of each of which `audit` is told first."""
    for request, token in tokens:
        if audit is not None:
            audit.take(request, token)
        yield request, token


def _texts(
    engine: AnyEngine,
    requests: list[Request],
    audit: Watcher | None,
    on_token: Callable[[int, Token], None] | None,
    streamer: Any,
) -> list[list[Token]]:
    """The new tokens of all requests, which have a slot each."""
    rows = {request: row for row, request in enumerate(requests)}
    tokens: list[list[Token]] = [[] for _ in requests]
    for request, token in _watched(engine.stream(requests), audit):
        tokens[rows[request]].append(token)
        if on_token:
            on_token(rows[request], token)
        if streamer is not None:
            streamer.put(torch.tensor([token.id]))
    if streamer is not None:
        streamer.end()
    return tokens


def generate_batch(
    model: Network,
    prompts: Iterable[Any],
    leaving: Leaving | None = None,
    *,
    slots: int = 16,
    capacity: int | None = None,
    compile: bool | None = None,
    audit: Watcher | None = None,
    **kwargs: Any,
) -> Iterator[tuple[int, GenerateOutput]]:
    """Generate from any number of prompts, `slots` at a time: (number, output) as each text ends.

    A text that ends frees its slot for the next prompt, which is asked for only then. Ending the
    iteration gives up what is in progress. Other threads have their turns between rounds.

    prompts: token ids, as lists or tensors (P,); or what a tokenizer gives for one text; or dicts
        of ``input_ids`` and arguments that this prompt has for itself: a mode, a threshold, …
    capacity: tokens of a prompt with its text at most; default: the backbone's context. Where
        rotary frequencies change at a length (longrope), default: that; with more, all texts have
        those of long ones.
    leaving, audit, kwargs: as for `generate`, for all prompts. Their `exit_layers`, `max_pending`
        and `lookup` bound those of the single prompts.

    Raises:
        UserError: as `generate`. A prompt that cannot be had is refused by its number when its turn
            comes: the texts in progress end first, and no further prompt is asked for.
    """
    warn_ignored(kwargs)
    capacity = capacity or model.backbone.longest_text
    if not capacity:
        raise UserError("the backbone's config has no context length: give capacity")
    common = read_leaving(leaving, kwargs)
    exits, bound = widest(model, common)
    size: dict[str, Any] = {"slots": slots, "capacity": capacity, "max_pending": bound}
    size |= {"drafts": POLICIES[common.mode].verifies}
    numbers: dict[Request, tuple[int, list[Token]]] = {}
    policies: dict[str, Policy] = {}  # of prompts between which no code of the caller's ran
    kwargs["policies"] = policies if isinstance(prompts, Sequence) else None

    def requests() -> Iterator[Request]:
        for number, prompt in enumerate(prompts):
            try:
                found = _prompt_requests(model, prompt, common, kwargs)
                for request in _audited(found, audit):
                    engine.check(request, capacity)
            except UserError as error:
                raise UserError(f"prompt {number}: {error}") from error
            for request in found:
                numbers[request] = number, []
                yield request

    with engines_of(model).lend(model, exits, **size, compile=compile) as engine:
        for request, token in _watched(engine.stream(requests()), audit):
            numbers[request][1].append(token)
            if token.ends:
                number, tokens = numbers.pop(request)
                policies.clear()
                prompt = torch.tensor([request.ids])
                yield number, _output(prompt, [tokens], 0, model.backbone.device)


def widest(model: Network, leaving: Leaving) -> tuple[list[int], int]:
    """The exits and the bound of pending tokens that those of single prompts are within."""
    check_mode(leaving)
    leaving = with_certified(model, leaving)
    check_pending(leaving.max_pending)
    layers = active_layers(model, leaving.exit_layers, POLICIES[leaving.mode].verifies)
    return [LOOKUP] * leaving.lookup + layers, leaving.max_pending


def _prompt_requests(
    model: Network, prompt: Any, leaving: Leaving, kwargs: Mapping[str, Any]
) -> list[Request]:
    """The requests of one prompt of a batch, with what it says for itself."""
    own = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
    row, mask = as_row(own.pop("input_ids", None)), own.pop("attention_mask", None)
    given = {"leaving": leaving, **kwargs, **own}
    mask = torch.ones_like(row) if mask is None else as_row(mask)
    (ids,) = read_prompts(model, row, mask, given)
    with engines_of(model).turn:
        return to_requests(model, ids, **given)[0]


def warm_up(
    model: Network,
    leaving: Leaving | None = None,
    *,
    slots: int = 1,
    capacity: int | None = None,
    compile: bool | None = None,
    **kwargs: Any,
) -> float:
    """Compile and capture what `generate` with these settings will run; gives the seconds.

    slots: prompts at a time. capacity: as for `generate_batch`. kwargs: as for `generate`: texts
    that are sampled run other passes than greedy ones.
    """
    leaving = read_leaving(leaving, kwargs)
    policy, samples = make_policy(model, leaving), NOTHING
    if kwargs:
        (request, *_), _ = to_requests(model, [0], leaving, **{"max_new_tokens": 1, **kwargs})
        samples = request.chooser.samples
    capacity = capacity or model.backbone.longest_text or ROOM
    engines = engines_of(model)
    with engines.turn:
        engine = engines.fitting(
            model, policy.exit_layers, slots=slots, capacity=capacity,
            max_pending=policy.max_pending, compile=compile, drafts=policy.verifies,
        )  # fmt: skip
        start = time.perf_counter()
        engine.warm_up([policy.measure], [samples], drafts=policy.verifies)
    return time.perf_counter() - start


def _output(
    prompts: Tensor, tokens: list[list[Token]], padding: int, device: torch.device
) -> GenerateOutput:
    """prompts: (B, P); tokens: those of each row."""

    longest = max(len(row) for row in tokens)

    def table(name: str, fill: float) -> list[list[Any]]:
        return [
            [*(getattr(token, name) for token in row), *[fill] * (longest - len(row))]
            for row in tokens
        ]

    whole = torch.cat([prompts.cpu(), torch.tensor(table("id", padding))], dim=1)
    return GenerateOutput(
        sequences=sent(whole, device),
        exit_layers=sent(table("exit_layer", 0), device),
        confidences=sent(table("confidence", 0.0), device),
    )
