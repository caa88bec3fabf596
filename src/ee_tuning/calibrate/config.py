"""Settings of `calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ee_tuning.config import ActiveExits, SamplingConfig
from ee_tuning.settings import option

RiskName = Literal["next-token", "text", "nll", "task"]


@dataclass
class CalibrateConfig(ActiveExits, SamplingConfig):
    """Find the lowest threshold whose risk is proven to be small; it is saved with the exits."""

    data: list[str] = option(
        [], "prompts like those to come: files, folders or hub ids, as for regenerate", path=True
    )
    risk: RiskName = option(
        "next-token",
        "share of places of the full-depth text where another token is taken; text: of the free "
        "text; nll: nats per place lost, at most 1; task: loss of a metric, with --samples",
    )
    epsilon: float = option(0.01, "the risk that is allowed")
    delta: float = option(0.05, "probability that the risk is larger all the same")
    order: Literal["quantile", "pareto"] = option(
        "quantile",
        "how several exits are loosened: all by the same share of their tokens, or each time the "
        "one that saves most for its risk",
    )
    prompts: int = option(1000, "prompts at most")
    prompt_tokens: int = option(32, "tokens of a document that it is gone on from")
    max_prompt_tokens: int = option(512, "longer prompts are left out")
    max_new_tokens: int = option(128, "tokens of a text")
    slots: int = option(0, "texts at a time; 0: as many as are worth it and fit")
    system: str = option("", "system prompt of chats that have none")
    text_field: str = option("text", "name of the field with the text of a record")
    chat_template: str = option(
        "", "file with a chat template; default: the tokenizer's", path=True
    )
    skip_bad_records: bool = option(False, "pass over malformed records instead of stopping")

    samples: list[str] = option(
        [],
        "with --risk task: lm-eval's sample files, one per threshold, from careful to bold: "
        "1=full.jsonl 0.9=careful.jsonl 8:0.9,16:0.7=bold.jsonl; 1 is full depth",
    )
    metric: str = option(
        "", "with --risk task: a metric within [0, 1], larger is better; default: the only one"
    )
    dp: int = option(1, "parts of the prompts; torchrun starts dp × tp × pp processes")
    tp: int = option(1, "processes that share each layer of a model")
    pp: int = option(1, "stages of a model's layers, which work in turns")
    timeout: float = option(3600.0, "seconds after which a rank gives up waiting for another one")
