"""Runs of `tune` under several layouts of processes, all started together, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import tiny
from ranks import free_ports, launch
from safetensors.torch import load_file

BACKBONES = {
    "llama": ("llama", {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "biased": ("phi", {}),
}


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


class Runs:
    """Runs by name, each a folder; `start` them together, then look at what they left."""

    def __init__(self, root: Path, common: dict):
        self.root, self.common, self.cases = root, common, []

    def add(
        self, name, size=1, only_rank=None, count=False, ahead=False, folders=(), logits=2**28,
        **settings,
    ):  # fmt: skip
        case = {
            "size": size, "error": str(self.root / f"{name}.error-"), "only_rank": only_rank or {},
            "folders": folders, "logits": logits,
            "settings": self.common | {"out": str(self.root / name)} | settings,
        }  # fmt: skip
        case |= {"count": str(self.root / f"{name}.traffic-")} if count else {}
        case |= {"ahead": str(self.root / f"{name}.ahead")} if ahead else {}
        self.cases.append(case)

    def start(self, seconds=300):
        # Ranks that are not in a run wait for the next one: so the largest come first.
        script = Path(__file__).parent / "launch.py"
        more = [self.root / "data"]
        self.output = launch(script, self.cases, self.root, *more, seconds=seconds)
        self.cases = []

    def error(self, name, rank=0):
        path = self.root / f"{name}.error-{rank}"
        return path.read_text() if path.exists() else None

    def tensors(self, name, path="exits.safetensors"):
        assert self.error(name) is None, self.error(name)
        return load_file(self.root / name / path)

    def records(self, name):
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def traffic(self, name, rank):
        return json.loads((self.root / f"{name}.traffic-{rank}").read_text())


@pytest.fixture(scope="session")
def new_runs(tmp_path_factory, backbones, data):
    """A new set of runs; their common settings may be changed for each."""

    def new():
        common = {
            "model": str(backbones / "llama"), "layers": "1,3,4,5",
            "arch": "embedding,norm,mlp,layer", "head": "own,shared,own,own", "data": [data],
            "steps": 3, "seq_length": 32,
            "micro_batch_size": 2, "global_batch_size": 5, "lr": 1e-3, "save_every": 1, "keep": 9,
            "eval_every": 2, "log_every": 1, "valid_fraction": 0.1, "timeout": 120.0,
            "dynamic_weights": True, "clip": 0.005,
        }  # fmt: skip
        return Runs(tmp_path_factory.mktemp("runs"), common)

    return new
