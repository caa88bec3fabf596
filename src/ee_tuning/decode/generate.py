"""`generate`: transformers' preparation, samplers, stopping and streaming around an `Engine`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import ModelOutput

from ee_tuning.config import Layers
from ee_tuning.decode.engine import Engine, Request
from ee_tuning.decode.pipeline import Stage
from ee_tuning.decode.policy import Policy, active_layers, make_policy
from ee_tuning.decode.speculative import Chooser, Token
from ee_tuning.errors import UserError, first_line

if TYPE_CHECKING:
    from ee_tuning.model import EarlyExitModel

# Arguments of transformers' `generate` that have no effect here, and those that cannot be had.
IGNORED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
REFUSED = {
    "assistant_model": "exits draft with mode speculative",
    "custom_generate": "leave it out",
    "inputs_embeds": "give token ids",
    "past_key_values": "give the whole text as the prompt",
    "position_ids": "positions follow from attention_mask",
    "streamer": "generate_batch gives whole texts; generate has one",
}
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


@dataclass
class Settings:
    """Where tokens leave.

    mode: ``full`` is the backbone alone; ``fixed`` ends every token at the one exit in
        `exit_layers`; ``threshold`` lets a token leave at the first active exit whose
        confidence is at least `threshold`. Threshold 1 switches exits off. ``speculative``
        takes such tokens for drafts that the remaining layers verify together: greedy tokens are
        those of ``full``, sampled ones have its distribution; see `ee_tuning.decode.speculative`.
    threshold: one for all exits, or one per exit layer: ``{8: 0.9, 16: 0.7}``.
    exit_layers: the active exits; default: all.
    max_pending: tokens that may leave before one has to go all the way; the longest draft.
    measure: of confidence: ``probability``, ``margin`` or ``entropy``, see
        `ee_tuning.losses.confidence`.
    min_depth: exits at shallower layers are not active.
    """

    mode: str = "threshold"
    threshold: float | Mapping[int, float] = 0.8
    exit_layers: Layers | None = None
    max_pending: int = 8
    measure: str = "probability"
    min_depth: int = 0

    def policy(self, model: EarlyExitModel) -> Policy:
        """See `make_policy` for the errors."""
        return make_policy(model, **{f.name: getattr(self, f.name) for f in fields(self)})


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

    Every row decides for itself, and its tokens do not depend on its neighbours. A model that
    several processes have parts of, see `ee_tuning.decode.load_part`, is called on all of them
    alike, and gives the same on each.

    attention_mask: (B, P), 0 where a shorter prompt is padded on its left; default: leading
        padding tokens, in a batch.
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
    _warn_ignored(kwargs)
    prompts = _prompts(model, input_ids, attention_mask)
    prepared = [prepare(model, ids, **kwargs) for ids in prompts]
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
        return_dict_in_generate = _said(kwargs, "return_dict_in_generate")
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
    capacity: tokens of a prompt with its text at most; default: the backbone's context.
    kwargs: `Settings` and arguments of transformers' ``generate``, for all prompts. Their
        `exit_layers` and `max_pending` bound those of the single prompts.

    Raises:
        UserError: as `generate`; a prompt that does not fit is refused when its turn comes.
    """
    _warn_ignored(kwargs)
    capacity = capacity or model.backbone.context
    if not capacity:
        raise UserError("the backbone's config has no context length: give capacity")
    exits = active_layers(model, kwargs.get("exit_layers"))
    bound = kwargs.get("max_pending", Settings.max_pending)
    engine = _engine(model, exits, slots, capacity, bound, compile)
    numbers: dict[Request, tuple[int, list[Token]]] = {}

    def requests() -> Iterator[Request]:
        for number, prompt in enumerate(prompts):
            own = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
            row, mask = _row(own.pop("input_ids")), own.pop("attention_mask", None)
            (ids,) = _prompts(model, row, None if mask is None else _row(mask))
            for request in prepare(model, ids, **kwargs | own)[0]:
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
    capacity = capacity or model.backbone.context or ROOM
    engine = _engine(model, policy.exit_layers, slots, capacity, policy.max_pending, compile)
    return engine.warm_up([policy.measure])


def prepare(model: EarlyExitModel, ids: list[int], **kwargs: Any) -> tuple[list[Request], int]:
    """What transformers makes of `kwargs` for a prompt.

    Requests, ``num_return_sequences`` of them, and the token behind a text that ended.

    Raises:
        UserError: what transformers says against them, or an argument that cannot be had here.
    """
    names = {f.name for f in fields(Settings)} & kwargs.keys()
    policy = Settings(**{name: kwargs.pop(name) for name in names}).policy(model)
    kwargs = _for_transformers(kwargs)
    requests: list[Request] = []
    padding = 0

    def loop(_: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
        nonlocal padding
        config = prepared["generation_config"]
        _check_mode(config)
        stops = _stops(prepared["stopping_criteria"], input_ids.device)
        for row in input_ids.tolist():
            chooser = Chooser(prepared["logits_processor"], config.do_sample)
            requests.append(Request(row, policy, config.max_length, chooser, stops))
        padding = _padding(config)
        return input_ids

    prompt = torch.tensor([ids], device=model.backbone.device)
    mask = torch.ones_like(prompt)
    try:
        model.backbone.model.generate(prompt, attention_mask=mask, custom_generate=loop, **kwargs)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(first_line(error)) from error
    return requests, padding


def _for_transformers(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for transformers' preparation, which neither makes a cache nor warns of it.

    It hands no tokenizer on to a loop that is not its own, so stop strings become a criterion here.
    """
    for name, advice in REFUSED.items():
        if kwargs.get(name) is not None:
            raise UserError(f"{name} cannot be had with early exits: {advice}")
    stop_strings, tokenizer = _said(kwargs, "stop_strings"), kwargs.get("tokenizer")
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    if stop_strings:
        if "" in stop_strings:
            raise UserError("a stop string is empty: every text would end at once")
        if tokenizer is None:
            raise UserError("stop_strings need the tokenizer: give it as tokenizer=")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    ours = ("stop_strings", "tokenizer", "use_cache", "return_dict_in_generate", *IGNORED)
    rest = {name: value for name, value in kwargs.items() if name not in ours}
    config = rest.get("generation_config")
    if config is None:
        return rest | {"stopping_criteria": criteria, "use_cache": False}
    config = copy.deepcopy(config)
    config.use_cache, config.stop_strings = False, None
    return rest | {"stopping_criteria": criteria, "generation_config": config}


def _said(kwargs: dict[str, Any], name: str) -> Any:
    """What the caller said of an argument, by itself or in a ``generation_config``."""
    value = kwargs.get(name)
    return getattr(kwargs.get("generation_config"), name, None) if value is None else value


def _check_mode(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        name = "beam search" if config.num_beams != 1 else mode.replace("_", " ")
        raise UserError(
            f"{name} is not possible with early exits: leave out what asks for it, num_beams or "
            "prompt_lookup_num_tokens for instance"
        )
    if config.guidance_scale not in (None, 1):
        raise UserError("guidance_scale is not possible with early exits: leave it out")


def _padding(config: GenerationConfig) -> int:
    """The token behind a text that ended, as transformers chooses it."""
    ends = config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    return next((token for token in (config.pad_token_id, end) if token is not None), 0)


def engine_for(model: EarlyExitModel, requests: list[Request], compile: bool | None) -> Engine:
    """An engine in which all of `requests` have a slot."""
    policies = [request.policy for request in requests]
    exits = sorted({layer for policy in policies for layer in policy.exit_layers})
    pending = max(policy.max_pending for policy in policies)
    capacity = max(request.max_length for request in requests)
    return _engine(model, exits, len(requests), capacity, pending, compile)


def _engine(
    model: EarlyExitModel,
    exit_layers: Sequence[int],
    slots: int,
    capacity: int,
    max_pending: int,
    compile: bool | None,
) -> Engine:
    """One of the model's engines if it fits and has room; else a new one, which the model keeps.

    Captured graphs hold the addresses of weights, so other weights want another engine.
    """
    mesh = model.mesh
    if compile is None:
        compile = model.backbone.device.type == "cuda" and mesh.tp == 1
    if compile and mesh.tp > 1:
        raise UserError("compile cannot be had with tp: sums between ranks do not compile")
    context = model.backbone.context
    if context and capacity > context and model.backbone.family.positions_end:
        raise UserError(
            f"{capacity} tokens with the prompt are asked for, the backbone has positions for "
            f"{context} alone: ask for fewer"
        )
    weights = tuple(p.data_ptr() for p in model.parameters())
    key = (tuple(exit_layers), max_pending, compile, weights)
    kept = model.engines.pop(key, None)
    if kept is None or kept.busy or kept.passes.slots < slots or kept.passes.capacity < capacity:
        room = -(-capacity // ROOM) * ROOM
        room = max(capacity, min(room, context or room))
        settings: dict[str, Any] = {"slots": slots, "capacity": room, "max_pending": max_pending}
        kind = Engine if mesh.pp == 1 else Stage
        kept = None

        def make() -> Engine:
            return kind(model, exit_layers, **settings, compile=compile)

        try:
            kept = mesh.on_all(make)
        except UserError:  # no room: that of the others may be enough
            model.engines.clear()
            kept = mesh.on_all(make)
    model.engines[key] = kept
    for oldest in list(model.engines)[:-ENGINES]:
        del model.engines[oldest]
    return kept


def _row(values: Any) -> Tensor:
    """A prompt of `generate_batch`, or its mask, as a batch (1, P)."""
    return torch.as_tensor(values, dtype=torch.int64).reshape(1, -1)


def _prompts(
    model: EarlyExitModel, input_ids: Tensor, attention_mask: Tensor | None
) -> list[list[int]]:
    """The rows of a batch, without their padding."""
    if not isinstance(input_ids, Tensor):
        found = type(input_ids).__name__
        raise UserError(f"generate takes a tensor of prompts of shape (B, P), not {found}")
    if input_ids.ndim != 2 or not len(input_ids) or input_ids.is_floating_point():
        found = f"{tuple(input_ids.shape)} of {input_ids.dtype}"
        raise UserError(f"generate takes token ids, prompts of shape (B, P), not {found}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
        config = model.backbone.config
        padding = getattr(config, "pad_token_id", None)
        if len(input_ids) > 1 and padding not in (None, getattr(config, "eos_token_id", None)):
            attention_mask = (input_ids != padding).cummax(-1).values.long()
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the prompts have "
            f"{tuple(input_ids.shape)}"
        )
    if (attention_mask[:, 1:] < attention_mask[:, :-1]).any():
        raise UserError("a prompt is padded on its right: set the tokenizer's padding_side to left")
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    context, size = model.backbone.context, model.backbone.config.vocab_size
    for ids in rows:
        if not ids:
            raise UserError("the prompt is empty: give at least one token")
        if context and len(ids) >= context:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the backbone's context is {context}: shorten it"
            )
        if not 0 <= min(ids) <= max(ids) < size:
            raise UserError(f"the prompt has a token outside the vocabulary of {size}")
    return rows


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


def _warn_ignored(kwargs: dict[str, Any]) -> None:
    for name in IGNORED:
        if _said(kwargs, name):
            warnings.warn(f"{name} is ignored: tokens come with exit_layers alone", stacklevel=4)


def _stops(criteria: StoppingCriteriaList, device: torch.device) -> Callable[[Sequence[int]], bool]:
    """Whether ids end by `criteria`; of the usual ones the device is not asked."""
    ends = [c.eos_token_id.tolist() for c in criteria if isinstance(c, EosTokenCriteria)]
    usual = (EosTokenCriteria, MaxLengthCriteria)  # a request has its length itself
    others = StoppingCriteriaList(c for c in criteria if not isinstance(c, usual))

    def stops(ids: Sequence[int]) -> bool:
        if any(ids[-1] in tokens for tokens in ends):
            return True
        return bool(others) and bool(others(torch.tensor([ids], device=device), None).all())

    return stops
