"""Settings of `regenerate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ee_tuning.config import Compiles
from ee_tuning.settings import Settings, option


@dataclass
class RegenerateConfig(Compiles, Settings):
    """Let a model write the data that its exits are tuned on."""

    model: str = option("", "backbone: a local folder or a hub id", path=True)
    data: list[str] = option(
        [],
        "where prompts come from: files, folders or hub ids, as for tune; default: nothing",
        path=True,
    )
    from_nothing: float | None = option(
        None,
        "share of the texts that begin from nothing: the model writes question and answer, or from "
        "its BOS token; default: all without --data, else none",
        fixed=True,
    )
    tokens: float = option(20e6, "tokens that the model is to write")
    out: str = option("", "the file to write, .jsonl, which tune --data reads", path=True)
    resume: bool = option(False, "go on with what is in --out, if anything")
    overwrite: bool = option(False, "replace what an earlier run wrote to --out")

    form: Literal["auto", "chat", "text"] = option(
        "auto",
        "chats, or plain text; auto: chats if the tokenizer has a chat template. Documents are "
        "gone on with as text in any case",
        fixed=True,
    )
    system: str = option("", "system prompt of chats that have none", fixed=True)
    text_field: str = option("text", "name of the field with the text of a record", fixed=True)
    chat_template: str = option(
        "", "file with a chat template; default: the tokenizer's", path=True
    )
    skip_bad_records: bool = option(
        False, "count malformed records and go on instead of stopping", fixed=True
    )
    prompt_tokens: int = option(32, "tokens of a document that it is gone on from", fixed=True)
    max_prompt_tokens: int = option(512, "longer prompts are left out", fixed=True)
    max_question_tokens: int = option(256, "tokens of a question that the model writes", fixed=True)
    max_new_tokens: int = option(512, "tokens of an answer or a text", fixed=True)
    drop_unfinished: bool = option(
        False, "leave out what has not ended after --max-new-tokens", fixed=True
    )
    dedup: bool = option(
        True, "leave out questions, or whole texts, that were there before", fixed=True
    )

    temperature: float = option(1.0, "sampling temperature; 0: the likeliest tokens", fixed=True)
    top_k: int = option(0, "sample among the k likeliest tokens; 0: all", fixed=True)
    top_p: float = option(
        0.95, "sample among the likeliest tokens up to this probability", fixed=True
    )
    min_p: float = option(
        0.0,
        "sample among tokens at least so likely, as a share of the likeliest's probability",
        fixed=True,
    )
    seed: int = option(0, "seed of the sampling, and of the order of files", fixed=True)

    slots: int = option(0, "texts at a time, which make a wave; 0: as many as are worth it")
    device: str = option("auto", "cpu, cuda or auto")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "precision of the model; auto: bf16 on a GPU, fp32 on CPU"
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto", "compile decoding, with CUDA graphs on a GPU; auto: on a GPU"
    )
    trust_remote_code: bool = option(False, "run code that comes with the backbone or tokenizer")
    dp: int = option(1, "waves at a time; torchrun starts dp × tp × pp processes")
    tp: int = option(1, "processes that share each layer of a model")
    pp: int = option(1, "stages of a model's layers, which work in turns")
    timeout: float = option(3600.0, "seconds after which a rank gives up waiting for another one")
