"""Settings of `serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ee_tuning.config import ActiveExits, Compiles
from ee_tuning.settings import Settings, option


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
