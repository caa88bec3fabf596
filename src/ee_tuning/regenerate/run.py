"""A run: wave after wave, each process its share of them, until there are tokens enough."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ee_tuning.data.cache import key_of as key_of_parts
from ee_tuning.data.chats import with_template
from ee_tuning.data.sources import contents, parse_source
from ee_tuning.decode.arguments import check_probabilities
from ee_tuning.decode.engine import Engine
from ee_tuning.decode.engines import engines_of
from ee_tuning.decode.load import load_part
from ee_tuning.devices import free_memory, pick_device, pick_dtype
from ee_tuning.errors import Interrupted, Notice, UserError, all_checked
from ee_tuning.exit_config import ExitConfig
from ee_tuning.grouped import use_grouped
from ee_tuning.loading import load_tokenizer
from ee_tuning.model import Network
from ee_tuning.parallel.data import collect, collect_hashes
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.regenerate.config import RegenerateConfig
from ee_tuning.regenerate.file import OutFile, State, Totals
from ee_tuning.regenerate.prompts import Prompt, prompts, shares_of
from ee_tuning.regenerate.template import read_template
from ee_tuning.regenerate.writer import Writer, Written, ends_of, key_of
from ee_tuning.settings import changed
from ee_tuning.share import New, Share

ADVICE = {  # by what texts are left out for
    "too long": "raise --max-prompt-tokens, or give shorter prompts",
    "no end of the question": "raise --max-question-tokens",
    "no question": "raise --temperature, or give prompts with --data",
    "duplicate": "raise --temperature, or use --dedup false",
    "unfinished": "raise --max-new-tokens, or leave --drop-unfinished out",
    "malformed": "correct the data",
    "empty": "give other prompts",
}
PATIENCE = 3, 64  # waves, and texts, of which none was kept: that is taken for a mistake
MOST_SLOTS, CPU_SLOTS = 1024, 32
OF_FREE_MEMORY = 0.6
SCORES = 8  # fp32 numbers for each token of the vocabulary, while a token is drawn
COUNTS = ("prompt_tokens", "max_prompt_tokens", "max_question_tokens", "max_new_tokens")


class Display:
    """What is shown of a run; this one shows nothing."""

    def say(self, text: str) -> None:
        """One line for the user."""

    @contextmanager
    def running(self, done: int, tokens: int) -> Iterator[None]:
        """Inside, tokens are written: so many of so many are there."""
        yield

    def advance(self, tokens: int) -> None:
        """So many tokens more were written."""

    def settled(self, done: int) -> None:
        """So many tokens are in the file."""


def regenerate(config: RegenerateConfig, display: Display | None = None) -> Totals:
    """Write ``config.tokens`` tokens to ``config.out``; gives what is in the file.

    Raises:
        UserError: a setting that cannot work, a model without chat template or BOS where texts
            begin from nothing, or a file that is there already.
        Interrupted: after Ctrl-C or SIGTERM; what was whole is in the file.
        ProcessFailed: one of several processes failed.
    """
    check(config)
    out = OutFile(config.out)
    mesh, device = Mesh(config.dp, config.tp, config.pp), pick_device(config.device)
    advice = "Go on with --resume"
    with mesh.connected(device, config.timeout, advice), _sigterm_as_ctrl_c():
        mesh.check_same("settings", repr(config))
        state = mesh.on_main(lambda: out.claim(config.resume, config.overwrite))
        shown = display if display is not None and mesh.is_main else Display()
        try:
            run = _Run(config, mesh, device, out, state, shown)
            state = run.state
            return run.go()
        except KeyboardInterrupt:
            if state is None or not (state.waves or state.end):
                raise Interrupted(
                    f"stopped before a wave was whole: {out.path} is as it was, begin again"
                ) from None
            raise Interrupted(
                f"stopped: whole waves are in {out.path}, go on with --resume"
            ) from None


def check(config: RegenerateConfig) -> None:
    """Refuse, before anything is loaded, settings that cannot work.

    Raises:
        UserError: says which.
    """
    if not config.model:
        raise UserError("no model given: name a folder or a hub id with --model")
    if config.tokens < 1:
        raise UserError(f"tokens {config.tokens:g} is too few: give at least 1")
    for name in COUNTS:
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}: give at least 1")
    for name in ("temperature", "top_k", "slots", "seed"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} {getattr(config, name):g} is negative: give 0 or more")
    check_probabilities(config.top_p, config.min_p)


class _Run:
    """One run, from the first wave that is not in the file."""

    def __init__(
        self,
        config: RegenerateConfig,
        mesh: Mesh,
        device: torch.device,
        out: OutFile,
        state: State | None,
        display: Display,
    ) -> None:
        self.config, self.mesh, self.out, self.display = config, mesh, out, display
        self.sources = mesh.on_all(lambda: [parse_source(text) for text in config.data])
        alone = mesh.on_all(lambda: shares_of(config, self.sources))[-1]
        if alone and not config.temperature:
            raise UserError(
                "with temperature 0 all texts that begin from nothing are the same: raise it"
            )
        self.model, self.tokenizer = load_backbone(config, device, mesh)
        self.chats = mesh.on_all(lambda: writes_chats(config, self.tokenizer, alone))
        if (unused := ignored(config, self.chats and bool(alone))) and mesh.is_main:
            warnings.warn(unused, Notice, stacklevel=2)
        self.capacity = capacity_of(config, self.model)
        settings = self._settings(device)
        slots = config.slots
        if state is not None:  # without a number it goes on with the one that it had
            slots = slots or state.slots
            begun = state.settings | {"slots": state.slots}
            check_settings(begun, settings | {"slots": slots})
        slots = slots or min(mesh.gather_on_host(slots_for(self.model, self.capacity)))
        self.state = state or State(settings, slots)
        self.totals = self.state.copied()
        self.seen = set(mesh.on_main(lambda: out.keys(self.state)))
        given = prompts(config, self.sources, self.chats)
        first = mesh.on_all(lambda: list(islice(given, 1)))  # read, or refused, before a word
        self.prompts = chain(first, given)
        self.given = 0  # prompts that were taken

    def go(self) -> Totals:
        """Write until there are enough tokens."""
        config, state = self.config, self.state
        if state.end is not None and state.end["tokens"] >= config.tokens:
            self.display.say("there are as many tokens already: nothing was written")
            return Totals(**state.end["totals"])
        engines, compile = engines_of(self.model), config.compiled()
        size: dict[str, Any] = {"slots": state.slots, "capacity": self.capacity, "max_pending": 8}
        with ExitStack() as held:
            lent = engines.lend(self.model, [], **size, compile=compile, drafts=self.mesh.pp > 1)
            engine = held.enter_context(lent)
            assert isinstance(engine, Engine)
            writer = self.mesh.on_all(lambda: self._writer(engine))
            all_checked()
            self._say_what()
            held.enter_context(self.display.running(self.totals.tokens, int(config.tokens)))
            waves, left_out = 0, Counter(self.totals.left_out)
            while state.end is None or state.end["tokens"] < config.tokens:
                before = self.totals.texts
                if not self._round(writer):
                    self.display.say("there are no more prompts, and again they get the same texts")
                    break
                if self.totals.texts > before:
                    waves, left_out = 0, Counter(self.totals.left_out)
                    continue
                waves, fruitless = waves + 1, Counter(self.totals.left_out) - left_out
                if waves >= PATIENCE[0] and fruitless.total() >= PATIENCE[1]:
                    reasons = ", ".join(f"{k} ({v:,})" for k, v in fruitless.items())
                    texts = f"{fruitless.total():,} texts"
                    advice = "; ".join(ADVICE[k] for k in fruitless)
                    raise UserError(f"of the last {texts} none was kept: {reasons}; {advice}")
        return self.totals

    def _round(self, writer: Writer) -> bool:
        """A wave of each process; all of them take in all, and the main one writes. Gives whether
        there were prompts."""
        self.mesh.doing = f"wave {self.state.waves}"
        wave = self.state.waves + self.mesh.dp_rank
        own = self.mesh.on_all(lambda: writer.wave(self._prompts_of(wave), self._advance))
        waves = [found for found in collect([own], self.mesh) if found]
        for found in waves:
            if self._take(found):
                break
        return bool(waves)

    def _advance(self, tokens: int) -> None:
        self.display.advance(tokens * self.mesh.dp)

    def _prompts_of(self, wave: int) -> list[Prompt]:
        first = wave * self.state.slots
        found = list(
            islice(self.prompts, first - self.given, first - self.given + self.state.slots)
        )
        self.given = first + self.state.slots
        return found

    def _take(self, found: list[Written]) -> bool:
        """Take in the next wave; gives whether that is enough."""
        state, lines, enough = self.state, [], False
        for one in found:
            if not one.left_out and self.config.dedup:
                key = key_of(one.record)
                if key in self.seen:
                    one = Written(one.source, left_out="duplicate")
                self.seen.add(key)
            self.totals.add(one)
            if not one.left_out:
                lines.append(json.dumps(one.record, ensure_ascii=False).encode() + b"\n")
            if self.totals.tokens >= self.config.tokens:
                enough = True
                break
        start, data = state.size, b"".join(lines)
        if enough:
            totals = dataclasses.asdict(self.totals)
            state.end = {"tokens": self.totals.tokens, "totals": totals}
        else:
            state.waves, state.size = state.waves + 1, start + len(data)
            state.end, state.totals = None, self.totals
            self.totals = state.copied()
        self.mesh.on_main(lambda: self.out.append(state, data, start))
        self.display.settled(self.totals.tokens)
        return enough

    def _writer(self, engine: Engine) -> Writer:
        ends = ends_of(self.model.backbone.model, self.tokenizer)
        template = None
        if self.chats:
            template = read_template(self.tokenizer, self.config.system, ends)
            ends = ends | template.ends
        return Writer(engine, self.tokenizer, self.config, template, ends)

    def _say_what(self) -> None:
        names = [source.name for source in self.sources] + ["nothing"]
        shares = shares_of(self.config, self.sources)
        parts = [f"{s:.0%} from {n}" for n, s in zip(names, shares, strict=True) if s]
        kind = "chats" if self.chats else "texts"
        self.display.say(
            f"writing {self.config.tokens:,.0f} tokens of {kind}, {', '.join(parts)}; "
            f"{self.state.slots} at a time"
        )

    def _settings(self, device: torch.device) -> dict[str, Any]:
        """What the texts follow from."""
        fields = dataclasses.fields(self.config)
        values = {f.name: getattr(self.config, f.name) for f in fields if f.metadata["fixed"]}
        identities = [(source.weight, contents(source.identity())) for source in self.sources]
        return values | {
            "model": backbone_key(self.model, self.mesh),
            "tokenizer": key_of_parts(
                sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template
            ),
            "data": key_of_parts(identities),
            "precision": str(pick_dtype(self.config.precision, device)),
        }


def load_backbone(
    config: RegenerateConfig, device: torch.device, mesh: Mesh
) -> tuple[Network, PreTrainedTokenizerBase]:
    """The model, or this process's part, and its tokenizer, with another chat template if one is
    given."""
    # A network has an exit: this one has no weights.
    source = New(
        config.model, ExitConfig("1/1", "embedding", head="shared"), config.trust_remote_code
    )
    share = Share(dtype=pick_dtype(config.precision, device), device=device)
    model = load_part(source, share, Network, mesh)
    use_grouped(model)
    rows, trust = model.backbone.config.vocab_size, config.trust_remote_code
    tokenizer = mesh.on_all(lambda: load_tokenizer(config.model, rows, trust))
    return model.eval(), mesh.on_all(lambda: with_template(tokenizer, config.chat_template))


def writes_chats(
    config: RegenerateConfig, tokenizer: PreTrainedTokenizerBase, alone: float
) -> bool:
    """Whether texts are chats; alone: the share of those that begin from nothing.

    Raises:
        UserError: the tokenizer lacks what these, or chats, begin with.
    """
    chats = config.form == "chat" or (config.form == "auto" and bool(tokenizer.chat_template))
    if chats and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: give one with --chat-template")
    if alone and not chats and tokenizer.bos_token_id is None:
        raise UserError(
            "texts cannot begin from nothing: the tokenizer has no chat template and no BOS token; "
            "give prompts with --data, or a template with --chat-template"
        )
    if config.system and not chats:
        raise UserError("system is for chats, and texts are written: leave --system out")
    return chats


def ignored(config: RegenerateConfig, questions: bool) -> str:
    """What to say of settings that are not as by default, and that nothing asks for, if any.

    questions: whether the model writes some.
    """
    of_data = () if config.data else ("text_field", "prompt_tokens", "skip_bad_records")
    of_questions = () if questions else ("max_question_tokens",)
    given = [
        *(f"{key} is for documents in --data" for key in changed(config, of_data)),
        *(f"{key} is for questions, and none is written" for key in changed(config, of_questions)),
    ]
    return f"ignored: {'; '.join(given)}" if given else ""


def capacity_of(config: RegenerateConfig, model: Network) -> int:
    """Tokens of a text at most, with its prompt."""
    wanted = config.max_prompt_tokens + config.max_new_tokens
    return min(wanted, model.backbone.longest_text or wanted)


def slots_for(model: Network, capacity: int) -> int:
    """Texts at a time that are worth it and fit."""
    backbone, config = model.backbone, model.backbone.config
    if backbone.device.type == "cpu":
        return CPU_SLOTS
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * backbone.num_layers * heads * width * backbone.dtype.itemsize
    need = token * capacity + SCORES * 4 * config.vocab_size
    most = OF_FREE_MEMORY * (free_memory(backbone.device) or 0) / need
    slots = MOST_SLOTS
    while slots > max(most, 1):
        slots //= 2
    return slots


def backbone_key(model: Network, mesh: Mesh) -> str:
    """Differs where a backbone's weights do, as far as its fingerprint tells."""
    return key_of_parts(sorted(collect_hashes(model.tensor_hashes, mesh).items()))


def check_settings(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse to go on otherwise than a file began.

    Raises:
        UserError: names the first setting that differs.
    """
    for name, value in json.loads(json.dumps(own)).items():
        if saved.get(name) != value:
            shown = name in ("model", "tokenizer", "data")
            was = f"another {name}" if shown else f"{name} {saved.get(name)!r}, now {value!r}"
            raise UserError(
                f"the file was begun with {was}: go on with the same, or begin again with "
                "--overwrite"
            )


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        with nullcontext():
            yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
