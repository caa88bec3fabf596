"""`ee-tuning generate`: text in the terminal, each token coloured by the layer it left at."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import torch
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ee_tuning import decode
from ee_tuning.certificate import CALIBRATED
from ee_tuning.config import GenerateConfig
from ee_tuning.data.chats import with_template
from ee_tuning.decode.arguments import to_requests
from ee_tuning.decode.engines import engines_of
from ee_tuning.decode.load import load_for_decoding
from ee_tuning.decode.sampling import Token
from ee_tuning.decode.settings import POLICIES, ignored
from ee_tuning.decode.text import TextStream, depth_colour, encode_chat, encode_prompt
from ee_tuning.devices import pick_device
from ee_tuning.errors import Notice, UserError, all_checked
from ee_tuning.exit_config import exit_name, mean_depth
from ee_tuning.invariant import Invariant
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import Mesh


class DepthStreamer:
    """Prints tokens as they come, in the colour of their depth.

    Follows transformers' streamer convention (`put`, `end`); `on_token` tells it the depth of
    the token that `put` brings next. Characters of several tokens wait until they are whole.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        console: Console,
        depth: int,
        shows_prompt: bool = True,
    ) -> None:
        self.console, self.depth, self.shows_prompt = console, depth, shows_prompt
        self.text = TextStream(tokenizer, skip_special_tokens=True)
        self.layer = depth
        self.layers: list[int] = []
        self.ids: list[int] = []
        self.prompt_seen = False

    def on_token(self, row: int, token: Token) -> None:
        """The next token left at ``token.exit_layer``."""
        self.layer = token.exit_layer
        self.layers.append(token.exit_layer)
        self.ids.append(token.id)

    def put(self, ids: torch.Tensor) -> None:
        """Print what `ids` add to the text; the first call brings the prompt."""
        if not self.prompt_seen:
            all_checked()  # the prompt comes behind all that could be refused
        new = self.text.put(ids.flatten().tolist())
        if self.prompt_seen or self.shows_prompt:
            self._print(new)
        self.prompt_seen = True

    def end(self) -> None:
        """Print what still waits, and end the line."""
        self._print(self.text.end())
        self.console.print()

    def _print(self, new: str) -> None:
        style = f"bold {depth_colour(self.layer, self.depth)}" if self.prompt_seen else "dim"
        # As it is: a Text would have spaces for tabs.
        self.console.print(Segments([Segment(new, Style.parse(style))]), end="", soft_wrap=True)


def generate(config: GenerateConfig, console: Console | None = None) -> None:
    """Generate from ``config.prompt`` and print the coloured text, a legend and the mean depth.

    With ``config.chat`` and no prompt, do so for every line of standard input, as a conversation.

    Of several processes all do the same, and the first one prints.

    Raises:
        UserError: an empty prompt, settings that do not go together, or what
            `ee_tuning.decode.generate` raises.
        ProcessFailed: one of several processes failed.
    """
    if config.stage_layers and config.pp == 1:
        raise UserError("stage_layers needs --pp: a single stage has all layers")
    mesh = Mesh(tp=config.tp, pp=config.pp)
    if mesh.is_main and (unused := ignored(config)):
        warnings.warn(unused, Notice, stacklevel=1)
    if config.calibrated:
        if config.threshold != GenerateConfig.threshold:
            raise UserError("threshold and calibrated are both given: leave one out")
        config = replace(config, threshold=CALIBRATED)
    with mesh.connected(pick_device(config.device), config.timeout, advice="Start it again"):
        mesh.check_same("settings", repr(config))
        _generate(config, mesh, console or Console(quiet=not mesh.is_main))


def _generate(config: GenerateConfig, mesh: Mesh, console: Console) -> None:
    """See `generate`."""
    prompt = mesh.on_main(_read_input) if config.prompt == "-" else config.prompt
    if prompt is None and not config.chat:
        taken = f"; {config.stop_strings[-1]!r} is a stop string" if config.stop_strings else ""
        raise UserError(
            "the prompt is empty: give one with --prompt, or - to read standard input, or --chat "
            f"for a conversation{taken}"
        )
    if (config.system or config.chat_template) and not config.chat:
        raise UserError("system and chat_template are for a chat: give --chat, too")
    model, tokenizer = load_for_decoding(config, mesh, config.stage_layers)
    tokenizer = with_template(tokenizer, config.chat_template)
    speaker = Speaker(config, mesh, console, model, tokenizer)
    messages = [{"role": "system", "content": config.system}] if config.system else []
    if prompt is not None:
        asked = [*messages, {"role": "user", "content": prompt}]
        speaker.answer(
            encode_chat(tokenizer, asked) if config.chat else encode_prompt(tokenizer, prompt)
        )
        return
    while (turn := mesh.on_main(_read_turn)) is not None:
        messages.append({"role": "user", "content": turn})
        reply = speaker.answer(encode_chat(tokenizer, messages), shows_prompt=False)
        messages.append({"role": "assistant", "content": reply})


class Speaker:
    """Generates one text after the other, and prints them with where their tokens left."""

    def __init__(
        self,
        config: GenerateConfig,
        mesh: Mesh,
        console: Console,
        model: Network,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.config, self.console, self.model = config, console, model
        self.tokenizer, self.arguments = tokenizer, _arguments(config, mesh)
        self.arguments["tokenizer"] = tokenizer
        mesh.doing = "decoding"
        torch.manual_seed(config.seed)
        compiled = engines_of(model).will_compile(model, config.compiled())
        missing = Invariant(model.backbone, compiled).missing
        if POLICIES[config.mode].verifies and missing:
            console.print(f"as at full depth but for rounding: {missing}", style="dim")

    def answer(self, ids: list[int], shows_prompt: bool = True) -> str:
        """Print, and give, what follows token ids; the prompt before it if it is shown."""
        config, model, depth = self.config, self.model, self.model.backbone.num_layers
        input_ids = torch.tensor([ids], dtype=torch.long)
        if engines_of(model).will_compile(model, config.compiled()):
            _compile_ahead(model, input_ids, config, self.arguments, self.console)
        streamer = DepthStreamer(self.tokenizer, self.console, depth, shows_prompt)
        start = time.perf_counter()
        decode.generate(
            model,
            input_ids,
            leaving=config,
            compile=config.compiled(),
            streamer=streamer,
            on_token=streamer.on_token,
            **self.arguments,
        )
        _print_legend(self.console, streamer.layers, depth, time.perf_counter() - start)
        return str(self.tokenizer.decode(streamer.ids, skip_special_tokens=True)).strip()


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError("standard input is not in UTF-8: convert it") from error


def _read_turn() -> str | None:
    """The next line of standard input that says something, or None at its end."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError("standard input is not in UTF-8: convert it") from error
        if not line or line.strip():
            return line.strip() or None


def _arguments(config: GenerateConfig, mesh: Mesh) -> dict[str, Any]:
    """What transformers' ``generate`` is asked for."""
    sampling = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    usual = {field.name: field.default for field in fields(GenerateConfig)}
    changed = any(value != usual[name] for name, value in sampling.items())
    if changed and not config.do_sample and mesh.is_main:
        warnings.warn(
            "temperature, top_k, top_p and min_p are ignored without do_sample",
            Notice,
            stacklevel=1,
        )
    return {
        "max_new_tokens": config.max_new_tokens,
        "do_sample": config.do_sample,
        "stop_strings": config.stop_strings or None,
        "repetition_penalty": config.repetition_penalty,
        **(sampling if config.do_sample else {}),
    }


def _compile_ahead(
    model: Network,
    input_ids: torch.Tensor,
    config: GenerateConfig,
    arguments: dict[str, Any],
    console: Console,
) -> None:
    """Compile before the clock starts, and say how long it took."""
    to_requests(model, input_ids[0].tolist(), config, **arguments)  # refuses before that
    capacity = input_ids.shape[1] + config.max_new_tokens
    seconds = decode.warm_up(
        model, leaving=config, capacity=capacity, compile=config.compiled(), **arguments
    )
    console.print(f"compiled in {seconds:.0f} s", style="dim")


def _print_legend(console: Console, layers: list[int], depth: int, seconds: float) -> None:
    legend = Text("left at layer")
    for layer in sorted(set(layers)):
        share = layers.count(layer) / len(layers)
        legend.append(
            f"  {exit_name(layer)} ({share:.0%})", style=f"bold {depth_colour(layer, depth)}"
        )
    console.print(legend)
    console.print(
        f"{len(layers)} tokens, mean depth {mean_depth(Counter(layers)):.1f} of {depth} layers, "
        f"{len(layers) / seconds:.1f} tokens/s with the prompt",
        highlight=False,
    )
