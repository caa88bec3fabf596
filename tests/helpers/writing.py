"""A tiny model that writes texts which end, and settings of runs in which it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from helpers.families import tiny

ENDS = [0, *range(60, 90)]  # tokens that end a text, so that random ones do


def save_writer(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> str:
    """Save a model with a tokenizer of `helpers.data`; gives its folder."""
    values = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "eos_token_id": 0}
    model = tiny("llama", **values | {"bos_token_id": tokenizer.bos_token_id} | changes)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings(model: str, out: Path, **changes: Any) -> dict[str, Any]:
    """Of a small run."""
    return {
        "model": model, "out": str(out), "tokens": 1000, "slots": 6, "max_new_tokens": 40,
        "max_question_tokens": 60, "device": "cpu",
    } | changes  # fmt: skip
