"""Runs of `tune` as several processes, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.ranks import launch


class Runs:
    """Runs by name, each a folder; `start` them together, then look at what they left."""

    def __init__(self, root: Path, common: dict):
        self.root, self.common, self.cases = root, common, []

    def add(
        self, name, size=1, only_rank=None, count=False, ahead=False, folders=(), logits=2**28,
        backend="inductor", **settings,
    ):  # fmt: skip
        case = {
            "size": size, "error": str(self.root / f"{name}.error-"), "only_rank": only_rank or {},
            "folders": folders, "logits": logits,
            "backend": backend,
            "settings": self.common | {"out": str(self.root / name)} | settings,
        }  # fmt: skip
        case |= {"count": str(self.root / f"{name}.traffic-")} if count else {}
        case |= {"ahead": str(self.root / f"{name}.ahead")} if ahead else {}
        self.cases.append(case)

    def start(self):
        # Ranks that are not in a run wait for the next one: so the largest come first.
        more = [self.root / "data"]
        module = "helpers.launch_tuning"
        self.output = launch(module, self.cases, self.root, *more)
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


def close(runs, one, many, tolerance):
    """Losses within a relative `tolerance`, weights within 2% of what AdamW's steps may move."""
    for a, b in zip(runs.records(one), runs.records(many), strict=True):
        assert a["step"] == b["step"]
        for key in a.keys() & {"loss", "grad_norm", "valid_loss", "draft_loss", "draft_agreement"}:
            assert b[key] == pytest.approx(a[key], rel=tolerance), key
    expected, found = runs.tensors(one), runs.tensors(many)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert (value - found[name]).abs().max() < 0.02 * 3e-3, name
        else:
            assert torch.equal(value, found[name])
