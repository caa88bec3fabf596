"""From a request's body to the texts that it asks for."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import (
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import LogitsProcessorList

from ee_tuning.certificate import CALIBRATED
from ee_tuning.config import Leaving
from ee_tuning.data.chats import REFUSALS
from ee_tuning.decode import Chooser, Full, Policy, Request
from ee_tuning.decode.settings import POLICIES
from ee_tuning.decode.text import encode_chat, encode_prompt
from ee_tuning.errors import UserError, first_line
from ee_tuning.exit_config import DRAFT
from ee_tuning.passes.noise import SEEDS
from ee_tuning.serve.bodies import (
    MOST,
    ChatBody,
    CompletionBody,
    Generation,
    Messages,
    TokenizeBody,
)
from ee_tuning.serve.choices import Choice
from ee_tuning.serve.errors import Refused
from ee_tuning.serve.messages import Facts
from ee_tuning.serve.pieces import Pieces
from ee_tuning.serve.processors import Bias, NotYet, Penalties, Seen

COMPLETION = 16  # tokens of a completion that says nothing else, as with OpenAI
REMEMBERED = 256  # settings of exits
COLDEST = 0.01  # a temperature below it would be 0 to fp32


@dataclass
class Asked:
    """What a body comes to: prompts, and the texts after them, `n` for each prompt in turn.

    top: likeliest tokens wanted with each, None for no log probabilities. prompt_scores: those of
    the prompts, too.
    """

    prompts: list[list[int]]
    choices: list[Choice]
    policy: Policy
    n: int
    top: int | None
    echo: bool
    prompt_scores: bool


class Reader:
    """Reads bodies for a model. Slow ones: not in the thread that serves everybody."""

    def __init__(
        self,
        facts: Facts,
        make: Callable[[Leaving], Policy],
        tokenizer: PreTrainedTokenizerBase,
        leaving: Leaving,
        mode: str,
    ) -> None:
        """facts: of the model. make: the model's policy of settings, see `make_policy`. leaving,
        mode: of requests that say nothing else.
        """
        self._make, self.leaving, self.mode = make, leaving, mode
        self.capacity, self.depth, self.size = facts.capacity, facts.depth, facts.size
        self.exit_layers, self.ends = facts.exit_layers, facts.ends
        self.drafting = [layer for layer in facts.exit_layers if layer != facts.depth]
        self.tokenizer = tokenizer
        self.own = copy.deepcopy(tokenizer)  # for the thread of the clients
        self.pieces = Pieces(tokenizer)
        self._policies: dict[str, Policy] = {}
        self._seeds = random.Random()

    def check_defaults(self) -> None:
        """Refuse settings with which no request could be decoded.

        Raises:
            UserError: says which.
        """
        try:
            self._policy(Generation())
        except Refused as error:
            raise UserError(str(error.__cause__ or error)) from error  # without a field's name

    def completion(self, body: CompletionBody) -> Asked:
        """Raises: Refused, UserError: it cannot be had."""
        given = body.prompt
        if isinstance(given, str):
            prompts: list[Any] = [given]
        elif isinstance(given[0], int):
            prompts = [given]
        else:
            prompts = list(given)
        n = body.n or 1
        if len(prompts) * n > MOST:
            raise Refused(f"n: {len(prompts)} prompts × {n} are more than {MOST} texts", "n")
        ids = [self.ids(prompt) for prompt in prompts]
        most = COMPLETION if body.max_tokens is None else body.max_tokens
        if most == 0 and not body.echo:
            raise Refused("max_tokens: 0 is possible with echo only", "max_tokens")
        echo, top = bool(body.echo), body.logprobs
        return self._asked(body, ids, most, top, echo)

    def chat(self, body: ChatBody) -> Asked:
        """Raises: Refused, UserError: it cannot be had."""
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused("top_logprobs: needs logprobs: true", "top_logprobs")
        given = (
            body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        )
        if body.max_tokens not in (None, given):
            raise Refused("max_tokens: max_completion_tokens says otherwise", "max_tokens")
        if given == 0:
            raise Refused("max_tokens: give 1 or more", "max_tokens")
        ids = self.chat_ids(body.messages)
        most = max(1, self.capacity - len(ids)) if given is None else given
        return self._asked(body, [ids], most, (body.top_logprobs or 0) if body.logprobs else None)

    def tokens(self, body: TokenizeBody) -> list[int]:
        """Raises: Refused, UserError: it cannot be had."""
        if (body.prompt is None) == (body.messages is None):
            raise Refused("prompt: give either prompt or messages", "prompt")
        if body.messages is not None:
            return self.chat_ids(body.messages, body.add_generation_prompt)
        assert body.prompt is not None
        if body.add_special_tokens:  # what a completion reads
            return self.ids(body.prompt)
        self._check_length(body.prompt, "prompt")
        encoded: Any = self.tokenizer(body.prompt, add_special_tokens=False)
        return encoded.input_ids

    def text(self, tokens: list[int]) -> str:
        """Of tokens, special ones, too."""
        self._check_ids(tokens, "tokens")
        return str(self.tokenizer.decode(tokens))

    def ids(self, prompt: str | list[int]) -> list[int]:
        """Of one prompt."""
        if not isinstance(prompt, str):
            self._check_ids(prompt, "prompt")
            return prompt
        self._check_length(prompt, "prompt")
        try:
            return encode_prompt(self.tokenizer, prompt)
        except UserError as error:
            raise Refused(f"prompt: {error}", "prompt") from error

    def chat_ids(self, messages: Messages, generation: bool = True) -> list[int]:
        """Of a chat."""
        if not self.tokenizer.chat_template:
            raise Refused("messages: this model has no chat template: give a prompt", "messages")
        turns = [message.plain() for message in messages]
        for turn in turns:
            self._check_length(turn["content"], "messages")
        try:
            return encode_chat(self.tokenizer, turns, generation)
        except REFUSALS as error:
            raise Refused(f"messages: {first_line(error)}", "messages") from error

    def _check_length(self, text: str, field: str) -> None:
        """Refuse what is too long whatever its tokens are, before these are made."""
        if len(text) > self.capacity * self.pieces.longest:
            raise self._too_long(f"{len(text)} characters", field)

    def _too_long(self, what: str, field: str) -> Refused:
        return Refused(
            f"{field}: {what} are more than the {self.capacity} tokens that a text may have with "
            "its prompt: shorten it, or ask for fewer tokens",
            field,
            code="context_length_exceeded",
        )

    def _check_ids(self, ids: Sequence[int], field: str) -> None:
        if ids and max(ids) >= self.size:
            raise Refused(
                f"{field}: token {max(ids)} is not in the vocabulary of {self.size}", field
            )

    def _asked(
        self,
        body: Generation,
        prompts: list[list[int]],
        most: int,
        top: int | None,
        echo: bool = False,
    ) -> Asked:
        if body.stream_options is not None and not body.stream:
            raise Refused("stream_options: needs stream: true", "stream_options")
        for ids in prompts:
            if len(ids) + most > self.capacity:
                field = "prompt" if isinstance(body, CompletionBody) else "messages"
                field = field if len(ids) >= self.capacity else "max_tokens"
                raise self._too_long(f"{len(ids)} tokens of the prompt and {most} new ones", field)
        n, policy = body.n or 1, self._policy(body)
        seed = body.seed
        choices = [
            self._choice(body, ids, policy, most, index, None if seed is None else seed + copy, top)
            for index, (ids, copy) in enumerate((ids, k) for ids in prompts for k in range(n))
        ]
        return Asked(
            prompts, choices if most else [], policy, n, top, echo, echo and top is not None
        )

    def _policy(self, body: Generation) -> Policy:
        """Where tokens leave.

        Raises:
            Refused: names the field that the mistake is in.
        """
        own = {field.name for field in fields(Leaving)} & body.model_fields_set
        given = {name: getattr(body, name) for name in own if getattr(body, name) is not None}
        mode = given.pop("mode", self.mode)
        threshold = given.get("threshold", self.leaving.threshold)
        if mode == "auto" and threshold == CALIBRATED:
            mode = "threshold"
        # Of requests that do not ask for it, for those alone whose drafts are verified.
        lookup = given.get("lookup", self.leaving.lookup and mode in ("auto", "speculative"))
        drafts = bool(self.exit_layers) or (lookup and mode == "speculative")
        if mode not in ("auto", "full") and not drafts:
            raise Refused(f"mode: {mode} needs exits, and this model has none", "mode")
        leaving = {**vars(self.leaving), **given, "mode": mode, "lookup": lookup}
        if mode == "auto":
            drafts = bool(self.drafting or lookup)
            leaving["mode"] = "speculative" if drafts else "full"
            if drafts and not leaving["exit_layers"] and DRAFT not in self.drafting:
                leaving["exit_layers"] = self.drafting or ""
        for name in () if mode == "auto" else POLICIES[mode].ignores:
            if name in given and name != "measure":  # confidences are by it in any mode
                raise Refused(f"{name}: mode {mode} ignores it: leave it out", name)
        if "threshold" in POLICIES[leaving["mode"]].ignores and threshold == CALIBRATED:
            leaving["threshold"] = 1.0
        try:
            return self._made(leaving)
        except UserError as error:
            # The one that it speaks of first.
            said = str(error)
            named = sorted((name for name in (*given, "mode") if name in said), key=said.find)
            field = named[0] if named else next(iter(given), "mode")
            raise Refused(f"{field}: {error}", field) from error

    def _made(self, leaving: dict[str, Any]) -> Policy:
        """The policy of these settings: the same for the same ones, of which there are few."""
        key = repr(leaving)
        if key not in self._policies:
            if len(self._policies) >= REMEMBERED:
                self._policies.clear()
            self._policies[key] = self._make(Leaving(**leaving))
        return self._policies[key]

    def _choice(
        self,
        body: Generation,
        ids: list[int],
        policy: Policy,
        most: int,
        index: int,
        seed: int | None,
        top: int | None,
    ) -> Choice:
        ends = frozenset(() if body.ignore_eos else self.ends) | {*(body.stop_token_ids or ())}
        self._check_ids([*ends], "stop_token_ids")
        seen = None if top is None else Seen(top)
        temperature = temperature_of(body)
        processors = self._processors(body, ids, ends, seen, temperature)
        own = self._seeds.randrange(SEEDS) if seed is None else seed % SEEDS
        chooser = Chooser(LogitsProcessorList(processors), temperature > 0, own)
        policy = self._certain(
            body, policy, bool(temperature or len(processors) > (top is not None))
        )
        request = Request(ids, policy, len(ids) + most, chooser)
        stops = [body.stop] if isinstance(body.stop, str) else (body.stop or [])
        least = body.min_tokens or 0
        if least > most:
            raise Refused(f"min_tokens: {least} are more than max_tokens, {most}", "min_tokens")
        return Choice(index, request, self.own, stops=stops, stop_ids=ends, least=least, seen=seen)

    def _certain(self, body: Generation, policy: Policy, changes: bool) -> Policy:
        """Full depth in place of calibrated thresholds, where their calibration says nothing.

        changes: there is more to the choice of a token than the likeliest one.

        Raises:
            Refused: the request itself asks for these.
        """
        threshold = self.leaving.threshold if body.threshold is None else body.threshold
        if threshold != CALIBRATED or not changes or policy.verifies:
            return policy
        if body.threshold is not None:
            raise Refused(
                "threshold: calibrated is of the likeliest tokens: give temperature 0, and "
                "neither penalties nor a bias",
                "threshold",
            )
        return Full(self.depth, measure=policy.measure, max_pending=policy.max_pending)

    def _processors(
        self,
        body: Generation,
        ids: list[int],
        ends: frozenset[int],
        seen: Seen | None,
        temperature: float,
    ) -> list[Any]:
        """In transformers' order: what depends on the text, then what samples are drawn from."""
        found: list[Any] = [] if seen is None else [seen]
        penalty = body.repetition_penalty
        if penalty is not None and penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(penalty))
        presence, frequency = body.presence_penalty or 0.0, body.frequency_penalty or 0.0
        if presence or frequency:
            found.append(Penalties(len(ids), presence, frequency))
        if body.logit_bias:
            found.append(Bias(self._bias(body.logit_bias)))
        if body.min_tokens and ends:
            found.append(NotYet(len(ids) + body.min_tokens, sorted(ends)))
        if not temperature:
            return found
        if temperature != 1:
            found.append(TemperatureLogitsWarper(temperature))
        if (body.top_k or 0) > 0:
            found.append(TopKLogitsWarper(min(body.top_k or 0, self.size)))
        if body.top_p is not None and body.top_p < 1:
            found.append(TopPLogitsWarper(body.top_p))
        if body.min_p:
            found.append(MinPLogitsWarper(body.min_p))
        return found

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        found = {}
        for name, value in given.items():
            if not (name.isascii() and name.isdigit() and len(name) < 10):
                raise Refused(f"logit_bias: {name!r} is no token id", "logit_bias")
            found[int(name)] = float(value)
        self._check_ids([*found], "logit_bias")
        return found


def temperature_of(body: Generation) -> float:
    """0 for the likeliest tokens.

    Raises:
        Refused: it is too small to divide by.
    """
    found = 1.0 if body.temperature is None else float(body.temperature)
    if 0 < found < COLDEST:
        raise Refused(
            f"temperature: {found} is too small: give 0 for the likeliest tokens, or at least "
            f"{COLDEST}",
            "temperature",
        )
    return found
