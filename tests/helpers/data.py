"""A small tokenizer, records as files, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ee_tuning.config import ReadingConfig
from ee_tuning.data import Rows, load_packed
from ee_tuning.errors import UserError

TEXT = "The quick brown fox jumps over the lazy dog. "
CHAT = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A brown fox, naïve 🦊."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "The dog."},
]
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL_TEMPLATE = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
STRICT_TEMPLATE = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    + PLAIN_TEMPLATE
)


def make_tokenizer(chat_template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 300 tokens; ``<eos>``, and ``<bos>`` in front if asked for."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<bos>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


TOKENIZER = make_tokenizer()
CHATTY = make_tokenizer(PLAIN_TEMPLATE)
EOS = TOKENIZER.eos_token_id


def jsonl(path: Path, *records) -> str:
    """Write records, or raw lines where they are strings."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def load(source, tokenizer=TOKENIZER, seq_length=16, seed=0, **more) -> Rows:
    sources = source if isinstance(source, list) else [source]
    return load_packed(
        [str(s) for s in sources], tokenizer, seq_length, seed, ReadingConfig(**more)
    )


def pieces(packed) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each piece, in the order of the rows, padding included."""
    found = []
    for row in packed:
        starts = [i for i, p in enumerate(row["position_ids"].tolist()) if p == 0]
        for start, stop in zip(starts, [*starts[1:], len(row["labels"])], strict=True):
            found.append(
                (row["input_ids"][start:stop].tolist(), row["labels"][start:stop].tolist())
            )
    return found


def texts(source, **more) -> list[str]:
    """The documents of a source as text, sorted; each must fit one row."""
    found = pieces(load(source, seq_length=512, **more))
    return sorted(
        TOKENIZER.decode(ids[:-1])
        for ids, labels in found
        if any(label != -100 for label in labels) and ids[-1] == EOS
    )


def learned(record, tokenizer, tmp_path, **more) -> str:
    """What counts in the loss of one record, as text."""
    (row,) = load(jsonl(tmp_path / "one.jsonl", record), tokenizer, seq_length=512, **more)
    labels = row["labels"][row["labels"] != -100]
    return tokenizer.decode(labels)


def fails(source, *parts: str, **more) -> None:
    """Loading is refused, in one line that has all `parts`."""
    with pytest.raises(UserError) as error:
        load(source, **more)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
