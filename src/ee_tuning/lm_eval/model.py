"""A backbone with exits as a model of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from ee_tuning.config import Leaving, SamplingConfig
from ee_tuning.decode import engines_of, generate_batch
from ee_tuning.decode.generate import widest
from ee_tuning.decode.load import load_for_decoding
from ee_tuning.decode.settings import ignored, make_policy
from ee_tuning.errors import UserError
from ee_tuning.exit_config import mean_depth
from ee_tuning.lm_eval.scoring import score
from ee_tuning.losses import LOGITS

ROOM = LOGITS // 8  # logits of a batch: each is there a few times
log = logging.getLogger(f"lm_eval.{__name__}")  # a name that lm-eval shows
SCORINGS = "forward", "decode"
# What a model of lm-eval's own takes that means the same here.
THEIRS = (
    "max_length", "truncation", "add_bos_token", "prefix_token_id", "think_end_token",
    "enable_thinking", "chat_template_args",
)  # fmt: skip


@dataclass
class Record:
    """Where the tokens of a task left: how many at which layer; and the seconds that they took, if
    they were generated."""

    layers: Counter[int] = field(default_factory=Counter)
    generated: int = 0
    seconds: float = 0.0

    def summary(self, depth: int) -> dict[str, Any]:
        """For the results: ``tokens``, ``mean_depth``, ``shares`` by layer, ``tokens_per_pass`` (to
        the end) and ``tokens_per_second``, prompts included.

        A kept draft counts with the layer it was drafted at, a draft exit's or a text's with 0.
        """
        tokens, ends = sum(self.layers.values()), self.layers[depth]
        if not tokens:
            return {"tokens": 0}
        shares = {layer: self.layers[layer] / tokens for layer in sorted(self.layers)}
        return {
            "tokens": tokens,
            "mean_depth": mean_depth(self.layers),
            "shares": shares,
            "tokens_per_pass": tokens / ends if ends else None,
            "tokens_per_second": self.generated / self.seconds if self.generated else None,
        }


class EarlyExitLM(HFLM):
    """lm-eval's model ``ee-tuning``.

    Prompts, padding and what is cut off a text are `HFLM`'s own, so that in lossless modes its
    answers are those of the backbone alone.
    """

    def __init__(
        self,
        exits: str = "",
        scoring: str = "forward",
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """exits: the folder or hub id. scoring: of log-likelihoods, ``forward`` is the backbone's,
        ``decode`` lets tokens leave as in decoding. settings: those of `SamplingConfig` and
        `Leaving`, and `THEIRS`.

        Raises:
            UserError: no exits, an unknown setting, or what `load_for_decoding` refuses.
        """
        theirs = {name: settings.pop(name) for name in THEIRS if name in settings}
        config, self.leaving = _read(exits, device, scoring, settings)
        self.scoring = scoring
        self.network, tokenizer = load_for_decoding(config)
        self.policy = make_policy(self.network, self.leaving)
        if unused := ignored(self.leaving):
            log.warning(unused)
        self.compile = config.compiled()
        self._records: dict[str, Record] = {}
        self._record = Record()
        self._warm = 0, 0
        with _without_warnings():  # of settings that are ignored: there are none
            super().__init__(
                pretrained=self.network.backbone.model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                **theirs,
            )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> EarlyExitLM:
        """As lm-eval's own, which has a device whether or not one was asked for: what
        ``--model_args`` says comes before that."""
        others = {k: v for k, v in (additional_config or {}).items() if k not in arg_dict}
        made: EarlyExitLM = super().create_from_arg_obj(arg_dict, others)
        return made

    # -- what lm-eval asks ------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow the prompts; see `HFLM`.

        Raises:
            UserError: a task asks for more tokens than the backbone's context has.
        """
        for request in requests:
            tokens = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if tokens >= self.max_length:
                raise UserError(
                    f"task {request.task_name} asks for {tokens} new tokens, the context has "
                    f"{self.max_length}: give fewer with --gen_kwargs max_gen_toks="
                )
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """(log-likelihood, whether greedy) of continuations; see `HFLM`."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihoods of whole texts, window by window; see `HFLM`."""
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """What the results file says of the model; where tokens left, under ``exits``, by task."""
        depth = self.network.backbone.num_layers
        return {
            "model_num_parameters": sum(p.numel() for p in self.network.parameters()),
            "model_dtype": str(self.network.dtype),
            "exits": {name: record.summary(depth) for name, record in self._records.items()},
        }

    def _by_task(
        self, answer: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool
    ) -> list[Any]:
        """The answers to `requests`, a task at a time, each with its own record."""
        answers: list[Any] = [None] * len(requests)
        for name in dict.fromkeys(request.task_name for request in requests):
            mine = [i for i, request in enumerate(requests) if request.task_name == name]
            self._record = self._records.setdefault(str(name), Record())
            found = answer([requests[i] for i in mine], disable_tqdm=disable_tqdm)
            for i, one in zip(mine, found, strict=True):
                answers[i] = one
            summary = self._record.summary(self.network.backbone.num_layers)
            log.info("%s: %s", name, summary)
        return answers

    # -- how it is answered -----------------------------------------------------------------------

    def _model_generate(
        self,
        context: Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Texts (B, P + N) that follow `context` (B, P), padded on the left."""
        assert attention_mask is not None
        if not kwargs.get("temperature"):  # as HFLM has it: 0 is greedy
            kwargs.pop("temperature", None)
            kwargs.setdefault("do_sample", False)
        rows = [ids[mask.bool()] for ids, mask in zip(context, attention_mask, strict=True)]
        prompts = [
            {"input_ids": ids, "stopping_criteria": [Stops(self.tokenizer, stop, len(ids))]}
            for ids in rows
        ]
        self._warm_up(len(rows), max_length)
        new: list[Tensor] = [context[0, :0]] * len(rows)
        start = time.perf_counter()
        for number, output in generate_batch(
            self.network,
            prompts,
            self.leaving,
            slots=len(rows),
            capacity=max_length,
            compile=self.compile,
            max_new_tokens=max_length - context.shape[1],
            **kwargs,
        ):
            assert output.sequences is not None
            assert output.exit_layers is not None
            new[number] = output.sequences[0, len(rows[number]) :]
            self._record.layers.update(output.exit_layers[0].tolist())
            self._record.generated += len(new[number])
        self._record.seconds += time.perf_counter() - start
        padding = int(self.tokenizer.pad_token_id)
        texts = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=padding)
        return torch.cat([context, texts.to(context)], dim=1)

    def _warm_up(self, slots: int, capacity: int) -> None:
        """Compile and capture what is coming, so that it does not count as decoding."""
        on_gpu = self.network.device.type == "cuda" and self.compile is not False
        if on_gpu and (slots > self._warm[0] or capacity > self._warm[1]):
            self._warm = max(slots, self._warm[0]), max(capacity, self._warm[1])
            engines, (exits, pending) = engines_of(self.network), widest(self.network, self.leaving)
            with engines.turn:
                engine = engines.fitting(
                    self.network, exits, slots=self._warm[0], capacity=self._warm[1],
                    max_pending=pending, compile=self.compile, drafts=self.policy.verifies,
                )  # fmt: skip
                engine.warm_up([self.policy.measure], drafts=self.policy.verifies)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of requests (texts, context, continuation), the last two as tokens."""
        if self.scoring == "forward":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        texts = [
            ((context + own)[-(self.max_length + 1) :], len(own)) for _, context, own in requests
        ]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(texts)
        for batch in self._batches(texts):
            for i, found in zip(
                batch, score(self.network, self.policy, [texts[i] for i in batch]), strict=True
            ):
                answers[i] = found.log_likelihood, found.greedy
                self._record.layers.update(found.layers)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def _batches(self, texts: list[tuple[list[int], int]]) -> Iterator[list[int]]:
        """Texts of about one length together, the longest first, as many as their logits allow.

        texts: each with how many of its tokens have logits.
        """
        asked = self.batch_size if isinstance(self.batch_size, int) else self.max_batch_size
        most = ROOM // self.network.backbone.config.vocab_size
        batch, counted = list[int](), 0
        for number in sorted(range(len(texts)), key=lambda i: -len(texts[i][0])):
            own = texts[number][1]
            if batch and (len(batch) == int(asked) or counted + own > most):
                yield batch
                batch, counted = [], 0
            batch.append(number)
            counted += own
        if batch:
            yield batch


class Stops(StoppingCriteria):
    """Whether one text, given without its padding, has one of some strings behind its prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: list[str], prompt: int) -> None:
        """prompt: tokens that are not looked at."""
        self.tokenizer, self.stop, self.prompt = tokenizer, stop, prompt
        # A token has a byte at least; a few more, since a tokenizer may strip what it begins with.
        self.window = max((len(text.encode()) for text in stop), default=0) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """For the one row of `input_ids` (1, P + N)."""
        written = input_ids[0, self.prompt :][-self.window :]
        text = self.tokenizer.decode(written)
        return torch.tensor([any(stop in text for stop in self.stop)], device=input_ids.device)


def _read(
    exits: str, device: str | None, scoring: str, settings: dict[str, Any]
) -> tuple[SamplingConfig, Leaving]:
    """What the model's arguments come to.

    Raises:
        UserError: no exits, an unknown argument or scoring, or several processes.
    """
    if not exits:
        raise UserError("no exits given: --model_args exits=FOLDER")
    if scoring not in SCORINGS:
        raise UserError(f"scoring {scoring!r} is unknown: use one of {', '.join(SCORINGS)}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("the model ee-tuning runs in one process: leave torchrun out")
    own = {f.name for f in dataclasses.fields(SamplingConfig)} - {"max_new_tokens", "seed"}
    leaving = {f.name for f in dataclasses.fields(Leaving)}
    unknown = sorted(settings.keys() - own - leaving)
    if unknown:
        known = ", ".join(sorted({*own, *leaving, *THEIRS, "scoring"}))
        raise UserError(f"the model ee-tuning has no argument {unknown[0]!r}: it has {known}")
    device = device if device is None else str(device)
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        device = "auto"  # lm-eval's own default is a GPU's name, whether or not there is one
    config = SamplingConfig(
        exits=str(exits), device=device, **{k: v for k, v in settings.items() if k in own}
    )
    return config, Leaving(**{k: v for k, v in settings.items() if k in leaving})


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Inside, nothing is logged but errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
