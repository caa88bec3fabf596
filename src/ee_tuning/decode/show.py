"""`ee-tuning generate`: text in the terminal, each token coloured by the layer it left at."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ee_tuning.config import GenerateConfig, SamplingConfig
from ee_tuning.decode.arguments import prepare
from ee_tuning.decode.generate import will_compile
from ee_tuning.decode.parts import load_part
from ee_tuning.decode.pipeline import NO_DRAFTS
from ee_tuning.decode.speculative import Token
from ee_tuning.devices import pick_device, pick_dtype
from ee_tuning.errors import Notice, UserError, first_line
from ee_tuning.loading import load_tokenizer
from ee_tuning.model import EarlyExitModel
from ee_tuning.parallel.mesh import Mesh

ONE_PROCESS = Mesh()


def depth_colour(layer: int, depth: int) -> str:
    """From green (early) over yellow to red (full depth), as ``#rrggbb``; the report's, too."""
    share = layer / depth
    red, green = min(1.0, 2 * share), min(1.0, 2 * (1 - share))
    return f"#{int(60 + 160 * red):02x}{int(60 + 130 * green):02x}46"


class DepthStreamer:
    """Prints tokens as they come, in the colour of their depth.

    Follows transformers' streamer convention (`put`, `end`); `on_token` tells it the depth of
    the token that `put` brings next. Characters of several tokens wait until they are whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, depth: int) -> None:
        self.tokenizer, self.console, self.depth = tokenizer, console, depth
        self.ids: list[int] = []
        self.printed = 0
        self.layer = depth
        self.layers: list[int] = []
        self.prompt_seen = False

    def on_token(self, row: int, token: Token) -> None:
        """The next token left at ``token.exit_layer``."""
        self.layer = token.exit_layer
        self.layers.append(token.exit_layer)

    def put(self, ids: torch.Tensor) -> None:
        """Print what `ids` add to the text; the first call brings the prompt."""
        self.ids += ids.flatten().tolist()
        self._print()

    def end(self) -> None:
        """Print what still waits, and end the line."""
        self._print(whole=True)
        self.console.print()

    def _print(self, whole: bool = False) -> None:
        """What is new; whole: an unfinished character, too."""
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if text.endswith("\ufffd") and not whole:
            return
        new, self.printed = text[self.printed :], len(text)
        style = f"bold {depth_colour(self.layer, self.depth)}" if self.prompt_seen else "dim"
        self.prompt_seen = True
        # As it is: a Text would have spaces for tabs.
        self.console.print(Segments([Segment(new, Style.parse(style))]), end="", soft_wrap=True)


def generate_and_show(config: GenerateConfig, console: Console | None = None) -> None:
    """Generate from ``config.prompt`` and print the coloured text, a legend and the mean depth.

    Of several processes all do the same, and the first one prints.

    Raises:
        UserError: an empty prompt, settings that do not go together, or what `generate` raises.
        ProcessFailed: one of several processes failed.
    """
    if config.stage_layers and config.pp == 1:
        raise UserError("stage_layers needs --pp: a single stage has all layers")
    if config.mode == "speculative" and config.pp > 1:
        raise UserError(NO_DRAFTS)
    mesh = Mesh(tp=config.tp, pp=config.pp)
    with mesh.connected(pick_device(config.device), config.timeout, advice="Start it again"):
        mesh.check_same("settings", repr(config))
        _generate_and_show(config, mesh, console or Console(quiet=not mesh.is_main))


def _generate_and_show(config: GenerateConfig, mesh: Mesh, console: Console) -> None:
    standard_input = config.prompt == "-"
    prompt = mesh.on_main(_read_input) if standard_input else config.prompt
    if not prompt:
        raise UserError("the prompt is empty: give one with --prompt, or - to read standard input")
    model, tokenizer = load_for_decoding(config, mesh, config.stage_layers)
    mesh.doing = "decoding"
    input_ids = encode_prompt(tokenizer, prompt, config.chat)
    streamer = DepthStreamer(tokenizer, console, model.backbone.num_layers)
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    usual = {name: getattr(GenerateConfig(), name) for name in sampling}
    if sampling != usual and not config.do_sample and mesh.is_main:
        warnings.warn(
            "temperature, top_k and top_p are ignored without do_sample", Notice, stacklevel=1
        )
    way: dict[str, Any] = {
        "mode": config.mode,
        "threshold": config.threshold,
        "compile": config.compiled(),
        **config.leaving(),
    }
    asked: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "do_sample": config.do_sample,
        "stop_strings": config.stop_strings or None,
        "tokenizer": tokenizer,
        **(sampling if config.do_sample else {}),
    }
    if will_compile(model, config.compiled()):
        prepare(model, input_ids[0].tolist(), **asked)  # refuses before anything is compiled
        capacity = input_ids.shape[1] + config.max_new_tokens
        console.print(f"compiled in {model.warm_up(capacity=capacity, **way):.0f} s", style="dim")
    torch.manual_seed(config.seed)
    start = time.perf_counter()
    model.generate(
        input_ids,
        streamer=streamer,
        on_token=streamer.on_token,
        **way,
        **asked,
    )
    seconds = time.perf_counter() - start
    _print_legend(console, streamer.layers, model.backbone.num_layers, seconds)


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError("standard input is not in UTF-8: convert it") from error


def load_for_decoding(
    config: SamplingConfig, mesh: Mesh = ONE_PROCESS, stage_layers: Sequence[int] = ()
) -> tuple[EarlyExitModel, PreTrainedTokenizerBase]:
    """The model, or this process's part of it, and tokenizer that a `SamplingConfig` names."""
    device = pick_device(config.device)
    model = load_part(
        config.exits,
        config.model or None,
        mesh=mesh,
        stage_layers=stage_layers,
        dtype=pick_dtype(config.precision, device),
        device=str(device),
    ).eval()
    return model, load_tokenizer(
        model.backbone.model.name_or_path, model.backbone.config.vocab_size
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids (1, P) of a prompt, in the tokenizer's chat template if `chat`.

    Raises:
        UserError: it is no text in UTF-8, or the template is missing or fails.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python's stand-ins for bytes it could not read
        raise UserError("the prompt is not in UTF-8: convert it") from error
    if not chat:
        return tokenizer(prompt, return_tensors="pt").input_ids
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: leave --chat out")
    try:
        encoded: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template fails: {first_line(error)}") from error
    return encoded["input_ids"]


def _print_legend(console: Console, layers: list[int], depth: int, seconds: float) -> None:
    legend = Text("left at layer")
    for layer in sorted(set(layers)):
        share = layers.count(layer) / len(layers)
        legend.append(f"  {layer} ({share:.0%})", style=f"bold {depth_colour(layer, depth)}")
    console.print(legend)
    mean = sum(layers) / len(layers)
    console.print(
        f"{len(layers)} tokens, mean depth {mean:.1f} of {depth} layers, "
        f"{len(layers) / seconds:.1f} tokens/s with the prompt",
        highlight=False,
    )
