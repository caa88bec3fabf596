"""What the arguments of `generate` come to, the way transformers reads them."""

from __future__ import annotations

import copy
import operator
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ee_tuning.certificate import CALIBRATED
from ee_tuning.config import Leaving
from ee_tuning.decode.certified import holds_for
from ee_tuning.decode.sampling import Chooser
from ee_tuning.decode.sequences import Request
from ee_tuning.decode.settings import Full, Policy, make_policy
from ee_tuning.errors import Notice, UserError, first_line
from ee_tuning.model import Network
from ee_tuning.settings import check_finite

# Arguments of transformers' `generate` that have no effect here, and those that cannot be had.
IGNORED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
REFUSED = {
    "assistant_model": "exits draft with mode speculative",
    "cache": "give the whole text as the prompt",
    "custom_generate": "leave it out",
    "inputs_embeds": "give token ids",
    "past_key_values": "give the whole text as the prompt",
    "position_ids": "positions follow from attention_mask",
    "streamer": "generate_batch gives whole texts; generate has one",
}
GIVE = ": give a tokenizer's, as in generate(**tokenizer(texts, return_tensors='pt', padding=True))"
USUAL = EosTokenCriteria, MaxLengthCriteria  # a request has its length itself
LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
IDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # dtypes of token ids


def read_leaving(leaving: Leaving | None, kwargs: dict[str, Any]) -> Leaving:
    """`leaving`, or else the defaults, with those of its fields that are in `kwargs`, taken out."""
    names = {field.name for field in fields(Leaving)} & kwargs.keys()
    return replace(leaving or Leaving(), **{name: kwargs.pop(name) for name in names})


def as_row(values: Any) -> Tensor:
    """A prompt of `generate_batch` (P,) or (1, P), or its mask, as a batch (1, P).

    Raises:
        UserError: it is nothing of the kind.
    """
    try:
        row = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        row = None
    if row is None or row.ndim == 0 or row.ndim > 2 or (row.ndim == 2 and len(row) != 1):
        found = "nothing" if values is None else type(values).__name__
        if row is not None:
            found = f"of shape {tuple(row.shape)}: give several prompts one by one"
        raise UserError(
            f"a prompt of generate_batch is token ids, as input_ids or alone, not {found}"
        )
    if not row.numel():
        raise UserError("the prompt is empty: give at least one token")
    return row.reshape(1, -1)


def read_prompts(
    model: Network,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> list[list[int]]:
    """The rows of a batch, without their padding.

    kwargs: those of `generate`, as what is padding may be said there.
    """
    if not isinstance(input_ids, Tensor):
        found = type(input_ids).__name__
        raise UserError(f"generate takes a tensor of prompts of shape (B, P), not {found}{GIVE}")
    if not isinstance(attention_mask, Tensor | None):
        found = type(attention_mask).__name__
        raise UserError(f"attention_mask is a tensor of the prompts' shape (B, P), not {found}")
    if input_ids.ndim != 2 or not len(input_ids) or input_ids.dtype not in IDS:
        found = f"{tuple(input_ids.shape)} of {input_ids.dtype}"
        raise UserError(f"generate takes token ids, prompts of shape (B, P), not {found}{GIVE}")
    input_ids = input_ids.cpu()  # each look at what a GPU has is a wait
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
        padding = _tokens(_holds(model, kwargs, "pad_token_id"))
        ends = _tokens(_holds(model, kwargs, "eos_token_id"))
        if padding and padding[0] not in ends:
            attention_mask = (input_ids != padding[0]).cummax(-1).values.long()
            attention_mask[:, -1:] = 1
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the prompts have "
            f"{tuple(input_ids.shape)}"
        )
    attention_mask = attention_mask.cpu()
    if (attention_mask[:, 1:] < attention_mask[:, :-1]).any():
        raise UserError("a prompt is padded on its right: set the tokenizer's padding_side to left")
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    context, size = model.backbone.context, model.backbone.config.vocab_size
    for ids in rows:
        if not ids:
            raise UserError("the prompt is empty: give at least one token")
        if context and len(ids) > context:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the backbone's context is {context}: shorten it"
            )
        if not 0 <= min(ids) <= max(ids) < size:
            raise UserError(f"the prompt has a token outside the vocabulary of {size}")
    return rows


def _holds(model: Network, kwargs: Mapping[str, Any], name: str) -> Any:
    """What an argument, or else the model's own generation config, says."""
    return said(kwargs, name, getattr(model.backbone.model.generation_config, name))


def _tokens(value: Any) -> list[int]:
    """The tokens that an argument names, in any of the forms that transformers takes."""
    return [] if value is None else torch.as_tensor(value).flatten().tolist()


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> set[int]:
    """Tokens that end a text, as a causal LM's generation config and a tokenizer say."""
    config = getattr(model, "generation_config", None)
    ends = _tokens(getattr(config, "eos_token_id", None))
    return {*ends, *_tokens(None if tokenizer is None else tokenizer.eos_token_id)}


def to_requests(
    model: Network,
    ids: list[int],
    leaving: Leaving | None = None,
    padded: int = 0,
    policies: dict[str, Policy] | None = None,
    **kwargs: Any,
) -> tuple[list[Request], int]:
    """What transformers makes of `kwargs` for a prompt that was padded by so many tokens.

    policies: see `_policy`.

    Requests, ``num_return_sequences`` of them, and the token behind a text that ended.

    Raises:
        UserError: what transformers says against them, or an argument that cannot be had here.
    """
    leaving = read_leaving(leaving, kwargs)
    policy, calibrated = _policy(model, leaving, policies), leaving.threshold == CALIBRATED
    known, key = _known(model), _key(kwargs)
    if key in known:
        terms = known[key]
        rows, length = [ids] * terms.number, len(ids) + kwargs["max_new_tokens"]
    else:
        terms, rows, length = _ask_transformers(model, ids, padded, kwargs)
        if key is not None and terms.alike:
            if len(known) >= MOST:
                known.clear()
            known[key] = terms
    requests = []
    for row in rows:
        chooser, own = Chooser(terms.processors, terms.sample), policy
        if calibrated and not holds_for(model, chooser.scores, length - len(row)):
            own = Full(model.backbone.num_layers, max_pending=policy.max_pending)
        requests.append(Request([*row], own, length, chooser, terms.stops))
    return requests, terms.padding


class Terms(NamedTuple):
    """What transformers makes of arguments, but for the length of a text.

    number: of texts of a prompt. padding: the token behind a text that ended. alike: they are the
    same for each prompt, at any time.
    """

    processors: LogitsProcessorList
    sample: bool
    stops: Callable[[Sequence[int], int], bool]
    number: int
    padding: int
    alike: bool


# Asking transformers takes as long as some tokens of a small model do. By model: its generation
# config, and what came of arguments while it was so.
_KNOWN: WeakKeyDictionary[Network, tuple[dict[str, Any], dict[str | None, Terms]]]
_KNOWN = WeakKeyDictionary()
MOST = 64  # of a model


def _known(model: Network) -> dict[str | None, Terms]:
    """What came of arguments before, by `_key`."""
    own = vars(model.backbone.model.generation_config)
    config, known = _KNOWN.get(model, ({}, {}))
    if config != own:
        known = {}
        _KNOWN[model] = copy.deepcopy(own), known
    return known


def _key(kwargs: Mapping[str, Any]) -> str | None:
    """Of arguments, but for how many new tokens they want; None, where that is not said by itself,
    or where some are objects, which may change."""
    number = kwargs.get("max_new_tokens")
    rest = sorted((name, value) for name, value in kwargs.items() if name != "max_new_tokens")
    plain = all(isinstance(value, int | float | str | None) for _, value in rest)
    return repr(rest) if plain and type(number) is int and number > 0 else None


def _ask_transformers(
    model: Network, ids: list[int], padded: int, kwargs: dict[str, Any]
) -> tuple[Terms, list[list[int]], int]:
    """As `to_requests`: terms, the ids with which each text begins, and its tokens at most."""
    config = kwargs.get("generation_config")
    for name, value in {**(vars(config) if config else {}), **kwargs}.items():
        if isinstance(value, float):  # a bias, which is in a list or mapping, may be infinite
            check_finite(name, value)
        if name in LENGTHS and value is not None:
            _whole(name, value)
    for name in ("max_length", "min_length") if padded else ():  # they count padding
        value = _holds(model, kwargs, name)
        if value:
            kwargs[name] = max(value - padded, 1)
    if _holds(model, kwargs, "do_sample"):
        check_probabilities(*(_holds(model, kwargs, name) for name in ("top_p", "min_p")))
    kwargs = _for_transformers(kwargs)
    criteria = kwargs["stopping_criteria"]  # the caller's, which take the place of transformers'
    lengths = [c.max_length - padded for c in criteria if isinstance(c, MaxLengthCriteria)]
    found: list[tuple[Terms, list[list[int]], int]] = []

    def loop(_: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
        config, processors = prepared["generation_config"], prepared["logits_processor"]
        _check_mode(config)
        criteria, rows = prepared["stopping_criteria"], input_ids.tolist()
        usual = all(isinstance(one, USUAL) for one in criteria)
        alike = usual and Chooser(processors).in_passes
        stops, padding = _stops(criteria, input_ids.device), _padding(config)
        terms = Terms(processors, config.do_sample, stops, len(rows), padding, alike)
        length = _whole("max_length", min(lengths, default=config.max_length))
        found.append((terms, rows, length))
        return input_ids

    prompt = torch.tensor([ids], device=model.backbone.device)
    mask = torch.ones_like(prompt)
    try:
        model.backbone.model.generate(prompt, attention_mask=mask, custom_generate=loop, **kwargs)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(first_line(error)) from error
    return found[0]


def _whole(name: str, value: Any) -> int:
    """A number of tokens, which may be numpy's or a tensor's, as one of Python's.

    Raises:
        UserError: it is no whole number.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise UserError(f"{name} is {value!r}: give a whole number") from error


def _policy(model: Network, leaving: Leaving, made: dict[str, Policy] | None) -> Policy:
    """That of one prompt. Making one asks whether a certificate holds, and so for the state of all
    weights. made: those of prompts before it, by settings; this one's is added."""
    made, settings = {} if made is None else made, repr(leaving)
    if settings not in made:
        made[settings] = make_policy(model, leaving)
    return made[settings]


def check_probabilities(top_p: float | None, min_p: float | None) -> None:
    """Refuse those that are none, or leave no token; transformers does not look at all of them.

    Raises:
        UserError: says which.
    """
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p:g}: it must be above 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise UserError(f"min_p is {min_p:g}: it must be at least 0 and at most 1")


def _for_transformers(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for transformers' preparation, which neither makes a cache nor warns of it.

    It hands no tokenizer on to a loop that is not its own, so stop strings become a criterion here.
    """
    for name, advice in REFUSED.items():
        if kwargs.get(name) is not None:
            raise UserError(f"{name} cannot be had with early exits: {advice}")
    stop_strings, tokenizer = said(kwargs, "stop_strings"), kwargs.get("tokenizer")
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
    for name in ("max_length", "min_length"):
        setattr(config, name, rest.pop(name, getattr(config, name)))
    return rest | {"stopping_criteria": criteria, "generation_config": config}


def said(kwargs: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """What the caller said of an argument, by itself or in a ``generation_config``."""
    if name in kwargs:
        return kwargs[name]
    value = getattr(kwargs.get("generation_config"), name, None)
    return default if value is None else value


def _check_mode(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        name = "beam search" if config.num_beams != 1 else mode.replace("_", " ")
        raise UserError(
            f"{name} is not possible with early exits: leave out what asks for it, num_beams for "
            "instance; for prompt_lookup_num_tokens there is lookup=True with mode speculative"
        )
    if config.guidance_scale not in (None, 1):
        raise UserError("guidance_scale is not possible with early exits: leave it out")


def _padding(config: GenerationConfig) -> int:
    """The token behind a text that ended, as transformers chooses it."""
    return [*_tokens(config.pad_token_id), *_tokens(config.eos_token_id), 0][0]


def warn_ignored(kwargs: Mapping[str, Any]) -> None:
    """Say which arguments of transformers' `generate` have no effect here."""
    for name in IGNORED:
        if said(kwargs, name):
            warnings.warn(
                f"{name} is ignored: tokens come with exit_layers alone", Notice, stacklevel=4
            )


def _stops(
    criteria: StoppingCriteriaList, device: torch.device
) -> Callable[[Sequence[int], int], bool]:
    """Whether the first so many ids of a text end it by `criteria`; of the usual ones the device is
    not asked, and stop strings are shown as many ids as they look at."""
    ends = [c.eos_token_id.tolist() for c in criteria if isinstance(c, EosTokenCriteria)]
    others = StoppingCriteriaList(c for c in criteria if not isinstance(c, USUAL))
    looked_at = sys.maxsize  # a criterion of the caller's may look at all of them
    if all(isinstance(c, StopStringCriteria) for c in others):
        looked_at = max((c.maximum_token_len for c in others), default=0)

    def stops(ids: Sequence[int], length: int) -> bool:
        if any(ids[length - 1] in tokens for tokens in ends):
            return True
        if not others:
            return False
        last = torch.tensor([ids[max(0, length - looked_at) : length]], device=device)
        return bool(others(last, None).all())

    return stops
