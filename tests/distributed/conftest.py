"""Runs of `tune` under several layouts of processes, all started together, once."""

from __future__ import annotations

import pytest
from helpers.families import tiny
from helpers.ranks import free_ports
from helpers.runs import Runs

BACKBONES = {
    "llama": ("llama", {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "biased": ("phi", {}),
    # Of an MLP's second matrix, cut by columns into two, rows have one block of 256, or are cut.
    "blocks": ("llama", {"intermediate_size": 512}),
    "cut-blocks": ("llama", {"intermediate_size": 384}),
    # For which transformers has no plan.
    "stablelm": ("stablelm", {}),
    "opt": ("opt", {}),
}


def pytest_collection_modifyitems(items):
    """What starts processes is slow."""
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def free_port():
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def backbones(tmp_path_factory, tokenizer):
    """Folders of tiny models of 5 layers by name."""
    root = tmp_path_factory.mktemp("backbones")
    for name, (family, values) in BACKBONES.items():
        values = {
            "vocab_size": 300,
            "max_position_embeddings": 128,
            "num_hidden_layers": 5,
        } | values
        tiny(family, **values).save_pretrained(root / name, max_shard_size="60KB")
        tokenizer.save_pretrained(root / name)
    tiny("gpt2", vocab_size=300, n_positions=128, n_layer=5).save_pretrained(root / "gpt2")
    tokenizer.save_pretrained(root / "gpt2")
    return root


@pytest.fixture(scope="session")
def new_runs(tmp_path_factory, backbones, data):
    """A new set of runs; their common settings may be changed for each."""

    def new():
        common = {
            "model": str(backbones / "llama"), "layers": "1,3,4,5",
            "arch": "embedding,norm,mlp,layer", "head": "own,shared,own,own", "data": [data],
            "steps": 3, "seq_length": 32,
            "micro_batch_size": 2, "global_batch_size": 5, "lr": 1e-3, "save_every": 1, "keep": 9,
            "eval_every": 3, "log_every": 1, "valid_fraction": 0.05, "timeout": 120.0,
            "dynamic_weights": True, "clip": 0.005,
        }  # fmt: skip
        return Runs(tmp_path_factory.mktemp("runs"), common)

    return new
