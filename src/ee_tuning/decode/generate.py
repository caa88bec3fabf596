"""`generate`: transformers' preparation, samplers, stopping and streaming around a `Decoder`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.utils import ModelOutput

from ee_tuning.config import MODES, Layers, parse_layers
from ee_tuning.decode.decoder import Decoder, Token
from ee_tuning.decode.speculative import Chooser, Draft, Pace, settle
from ee_tuning.errors import UserError

if TYPE_CHECKING:
    from ee_tuning.model import EarlyExitModel


@dataclass
class GenerateOutput(ModelOutput):
    """What `generate` returns.

    sequences: (1, P + N) int64, prompt and new tokens. exit_layers: (1, N) int64, the layer
    each new token left at. confidences: (1, N) fp32, its largest softmax probability there.
    """

    sequences: Tensor | None = None
    exit_layers: Tensor | None = None
    confidences: Tensor | None = None


def generate(
    model: EarlyExitModel,
    input_ids: Tensor,
    *,
    mode: str = "threshold",
    threshold: float = 0.8,
    exit_layers: Layers | None = None,
    max_pending: int = 8,
    on_token: Callable[[Token], None] | None = None,
    streamer: Any = None,
    **kwargs: Any,
) -> GenerateOutput:
    """Generate from one prompt (1, P); `kwargs` are those of transformers' ``generate``.

    mode: ``full`` is the backbone alone; ``fixed`` ends every token at the one exit in
        `exit_layers`; ``threshold`` lets a token leave at the first active exit whose
        confidence is at least `threshold`. Threshold 1 switches exits off. ``speculative``
        takes such tokens for drafts that the remaining layers verify together: greedy tokens are
        those of ``full``, sampled ones have its distribution; see `ee_tuning.decode.speculative`.
    exit_layers: the active exits; default: all.
    max_pending: tokens that may wait for their deeper K/V before one has to go all the way; the
        longest draft.
    on_token: called with every `Token`, before the streamer gets it and the next is computed.
    streamer: as in transformers.

    Raises:
        UserError: an unknown mode or exit, a threshold outside [0, 1], an empty prompt, one
            longer than the context, or more than one prompt.
    """
    _check_prompt(model, input_ids)
    decoder = make_decoder(model, mode, threshold, exit_layers, max_pending)
    tokens: list[Token] = []

    def seen(token: Token) -> None:
        tokens.append(token)
        if on_token:
            on_token(token)

    def loop(_: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
        return _loop(decoder, input_ids, seen, streamer, **prepared)

    # transformers prepares the configuration, samplers and stopping criteria and puts the prompt
    # into the streamer. It hands neither streamer nor tokenizer on to a loop that is not its own.
    sequences = model.backbone.model.generate(
        input_ids.to(model.backbone.device),
        custom_generate=loop,
        use_cache=False,
        streamer=streamer,
        stopping_criteria=_stopping_criteria(kwargs),
        **kwargs,
    )
    return GenerateOutput(
        sequences=sequences,
        exit_layers=torch.tensor([[token.exit_layer for token in tokens]]),
        confidences=torch.tensor([[token.confidence for token in tokens]]),
    )


def make_decoder(
    model: EarlyExitModel,
    mode: str,
    threshold: float = 1.0,
    exit_layers: Layers | None = None,
    max_pending: int = 8,
) -> Decoder:
    """The decoder of a mode; see `generate` for the arguments and errors."""
    depth = model.backbone.num_layers
    active = _active(model, exit_layers)
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    if not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
        raise UserError(f"threshold {threshold!r} is outside [0, 1]")
    if max_pending < 0:
        raise UserError(f"max_pending {max_pending} is negative")
    if mode == "fixed":
        if len(active) != 1:
            raise UserError(
                f"mode fixed needs one exit, there are {active}: name it with exit_layers"
            )
        return Decoder(model, active, active[0], max_pending, lambda *_: True)
    if mode == "full" or threshold == 1:
        return Decoder(model, [], depth, max_pending, lambda *_: False)
    inner = [layer for layer in active if layer < depth]
    if mode == "speculative":
        if inner != active:
            raise UserError(
                f"mode speculative cannot draft with the exit at the last layer, {depth}: leave it "
                "out of exit_layers"
            )
        return Decoder(model, inner, depth, max_pending, lambda _, v: v >= threshold, True)
    return Decoder(model, inner, depth, max_pending, lambda _, value: value >= threshold)


def _active(model: EarlyExitModel, exit_layers: Layers | None) -> list[int]:
    if not exit_layers:
        return model.exit_layers
    layers = sorted(parse_layers(exit_layers, model.backbone.num_layers))
    return [model.exit(layer).spec.layer for layer in layers]


def _stopping_criteria(kwargs: dict[str, Any]) -> StoppingCriteriaList:
    """The caller's criteria and those for ``stop_strings``, both taken out of `kwargs`."""
    criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
    stop_strings, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None)
    if stop_strings:
        if tokenizer is None:
            raise UserError("stop_strings need the tokenizer: give it as tokenizer=")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    return criteria


def _check_prompt(model: EarlyExitModel, input_ids: Tensor) -> None:
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise UserError(
            f"generate takes one prompt of shape (1, T), not {tuple(input_ids.shape)}: "
            "call it once per prompt"
        )
    if input_ids.shape[1] == 0:
        raise UserError("the prompt is empty: give at least one token")
    context = model.backbone.context
    if context and input_ids.shape[1] >= context:
        raise UserError(
            f"the prompt has {input_ids.shape[1]} tokens, the backbone's context is {context}: "
            "shorten it"
        )


def _loop(
    decoder: Decoder,
    input_ids: Tensor,
    seen: Callable[[Token], None],
    streamer: Any,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **_: Any,
) -> Tensor:
    """Predict, choose, append, until a criterion stops it: transformers' own order of things."""
    if generation_config.num_beams != 1:
        raise UserError("beam search is not possible with early exits: leave num_beams at 1")
    chooser = Chooser(logits_processor, generation_config.do_sample)
    ids = input_ids
    for token, chosen in _tokens(decoder, ids, chooser, generation_config.max_length):
        ids = torch.cat([ids, chosen], dim=-1)
        seen(token)
        if streamer is not None:
            streamer.put(chosen[0].cpu())
        if stopping_criteria(ids, None).all():
            break
    if streamer is not None:
        streamer.end()
    return ids


def _tokens(
    decoder: Decoder, ids: Tensor, chooser: Chooser, max_length: int
) -> Iterator[tuple[Token, Tensor]]:
    """What follows the prompt ids (1, T), without end: each token and its id (1, 1).

    Drafts come once they are settled. No draft goes beyond `max_length` tokens.
    """
    pace = Pace(decoder.max_pending)
    drafts: list[Draft] = []  # the end of ids
    token = decoder.prefill(ids)
    while True:
        if decoder.verifies and token.exit_layer < decoder.end:
            drafts.append(Draft(token, *chooser.choose(ids, token.logits)))
            ids = torch.cat([ids, drafts[-1].chosen], dim=-1)
        else:
            settled = settle(ids, drafts, token, chooser)
            yield from settled
            before = ids[:, : ids.shape[1] - len(drafts)]
            ids = torch.cat([before, *(chosen for _, chosen in settled)], dim=-1)
            if decoder.verifies:
                decoder.take_back(len(drafts) + 1 - len(settled))
                pace.learn(len(drafts), len(settled) - 1)
                decoder.max_pending = pace.drafts(max_length - ids.shape[1])
            drafts = []
        token = decoder.step(ids[:, -1:])
