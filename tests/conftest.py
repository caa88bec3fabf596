"""Fixtures shared by all tests. No test reaches the network."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import helpers
import pytest
import torch
from helpers.families import tiny
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ee_tuning.decode.pace import Clock

torch.set_num_threads(1)
settings.register_profile("any time", deadline=None)  # a machine may be busy
settings.load_profile("any time")

TEXT = "".join(
    f"def function_{i}(value):\n    total = {i}\n    for item in value:\n"
    f"        total += item * {i % 7}\n"
    f"    return total\n\n\nprint(function_{i}([1, 2, 3]))\n"
    for i in range(60)
)


def pytest_collection_finish() -> None:
    """All test files are imported."""
    helpers.imported()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """datasets keeps its files in a folder of this run."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own for what datasets and packed data keep."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(autouse=True)
def _many_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are taken to cost next to nothing, or tiny models would hardly ever have any; and
    rounds to take what their drafts cost, or it would depend on the machine how many they have."""
    monkeypatch.setattr("ee_tuning.decode.engine.draft_cost", lambda *_: 0.02)
    monkeypatch.setattr("ee_tuning.decode.sequences.Clock", Weighed)


class Weighed(Clock):
    """Rounds take what their drafts cost, and nothing has to be measured."""

    LEAST = 0

    def learn(self, drafts: int, seconds: float, rounds: int = 1) -> None:
        super().learn(drafts, 1 + self.cost * drafts, rounds)

    def share(self, drafts: float, seconds: float) -> float:
        return super().share(drafts, 1 + self.cost * drafts)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with 96 … 300 tokens, `<eos>` and `<pad>`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """A folder with a tiny random Llama (4 layers) and its tokenizer."""
    folder = str(tmp_path_factory.mktemp("base") / "llama")
    tiny("llama", vocab_size=300, max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSONL file of short documents."""
    path = tmp_path_factory.mktemp("data") / "code.jsonl"
    documents = TEXT.split("\n\n\n")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)
