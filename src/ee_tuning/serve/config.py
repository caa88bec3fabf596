"""Settings of `serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ee_tuning.certificate import CALIBRATED
from ee_tuning.config import ActiveExits, Compiles
from ee_tuning.errors import UserError
from ee_tuning.settings import Settings, changed, option


@dataclass
class ServeConfig(Compiles, ActiveExits, Settings):
    """Serve a model with exits, or a backbone alone, to OpenAI's clients."""

    exits: str = option("", "folder or hub id of the exits", path=True)
    model: str = option(
        "", "backbone; default: the one named in exit_config.json; alone: full depth", path=True
    )
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0: any that is free")
    api_key: str = option("", "key that clients have to send; default: none is asked for")
    mode: Literal["auto", "full", "fixed", "threshold", "speculative"] = option(
        "auto",
        "how requests that say nothing else are decoded; auto: speculative where there is what "
        "drafts, which rests while that is slower than full depth: the text is the same",
    )
    threshold: str | float | dict[int, float] = option(
        0.8,
        "confidence from which a token leaves, or is a draft; per exit: 8:0.9,16:0.7; or "
        "calibrated: mode auto is threshold then",
    )
    lookup: bool = option(
        False, "speculative requests that say nothing else draft from the text itself, too"
    )
    audit: int = option(
        100,
        "of texts with calibrated thresholds, one in so many is verified, and the risk among the "
        "metrics; 0: none",
    )
    slots: int = option(16, "sequences at a time")
    capacity: int = option(
        0, "tokens of a prompt with its text at most; 0: 4096, or the backbone's context if less"
    )
    max_queue: int = option(64, "requests that may wait; further ones get 429")
    deadline: float = option(600.0, "seconds that a request may take")
    grace: float = option(30.0, "seconds that requests in progress have to end after SIGTERM")
    chat_template: str = option(
        "", "file with a chat template; default: the tokenizer's", path=True
    )
    device: str = option("auto", "cpu, cuda or auto")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "precision of backbone and exits; auto: bf16 on a GPU, fp32 on CPU"
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto", "compile decoding, with CUDA graphs on a GPU; auto: on a GPU"
    )
    trust_remote_code: bool = option(False, "run code that comes with the backbone or tokenizer")


def check_settings(config: ServeConfig) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        UserError: nothing to serve, or a number out of its range.
    """
    if not config.exits and not config.model:
        raise UserError("nothing to serve: name exits with --exits, or a backbone with --model")
    drafts = config.lookup and config.mode == "speculative"
    if not config.exits and config.mode not in ("auto", "full") and not drafts:
        raise UserError(f"mode {config.mode} needs exits: give them with --exits")
    of_exits = changed(config, ("threshold", "exit_layers", "min_depth"))
    if of_exits and not config.exits and not config.lookup:
        raise UserError(f"{of_exits[0]} needs exits: give them with --exits")
    leaves = config.mode == "auto" and config.threshold == CALIBRATED
    if config.lookup and (leaves or config.mode not in ("auto", "speculative")):
        mode = "auto with calibrated thresholds" if leaves else config.mode
        raise UserError(f"lookup is not possible with mode {mode}: use mode speculative")
    for name, least in (
        ("slots", 1),
        ("capacity", 0),
        ("max_queue", 1),
        ("port", 0),
        ("audit", 0),
    ):
        if getattr(config, name) < least:
            raise UserError(f"{name} is {getattr(config, name)}: give {least} or more")
    if config.capacity == 1:
        raise UserError("capacity is 1: give 2 or more, for a prompt and what follows it")
    if config.port > 65535:
        raise UserError(f"port is {config.port}: give 65535 or less")
    if not config.deadline > 0 or not config.grace >= 0:
        raise UserError("deadline and grace are seconds: give more than 0, or 0 for grace")
