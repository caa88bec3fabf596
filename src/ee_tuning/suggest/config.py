"""Settings of `suggest`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ee_tuning.settings import Settings, option


@dataclass
class SuggestConfig(Settings):
    """Find out which exits promise most speed for a backbone on this machine."""

    model: str = option("", "backbone: a local folder or a hub id", path=True)
    data: list[str] = option(
        [], "text to probe with, as for tune; default: what the model writes itself", path=True
    )
    minutes: float = option(10.0, "time to take, about; a CPU takes some however few")
    prompt_length: int = option(32, "tokens of the prompts that speed is predicted for")
    max_new_tokens: int = option(64, "tokens generated after each of them")
    out: str = option("", "file for everything that was found, .json", path=True)
    seed: int = option(0, "seed of the texts")
    device: str = option("auto", "cpu, cuda or auto")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "precision of backbone and exits; auto: bf16 on a GPU, fp32 on CPU"
    )
    trust_remote_code: bool = option(False, "run code that comes with the backbone or tokenizer")
