"""Searching layouts: what is tried, what fits, and what docs and `plan` show of it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from shapes import SHAPES
from transformers import AutoModelForCausalLM, LlamaConfig

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.cli import main
from ee_tuning.config import TuneConfig
from ee_tuning.devices import GIB
from ee_tuning.plan.layouts import expected, search
from ee_tuning.plan.memory import memory
from ee_tuning.plan.shapes import account_of
from ee_tuning.plan.time import Seconds

ROOT = Path(__file__).parents[2]

PARTS = Seconds(layer=0.001, exit=0.005, optimizer=0.002)


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES["llama2-7b"]))
        return EarlyExitModel(backbone, ExitConfig("every:8", "mlp"))


@pytest.fixture(scope="module")
def config():
    return TuneConfig(seq_length=2048, micro_batch_size=1, global_batch_size=64)


def test_one_gpu_takes_what_its_parts_take(model, config):
    account = account_of(model, config)
    alone = expected(account, config, PARTS)
    seconds = 64 * (32 * 0.001 + 4 * 0.005) + 4 * 0.002
    assert alone.tokens_per_second == pytest.approx(64 * 2048 / seconds)
    assert alone.idle == pytest.approx(0.0)
    assert alone.memory == sum(memory(account, config, range(32)).values())


def test_what_fits_is_sorted_by_speed(model, config):
    found = search(model, config, PARTS, 8, 1000)
    assert {(x.dp, x.tp, x.pp) for x in found} == {
        (8, 1, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8), (4, 2, 1), (2, 2, 2), (1, 2, 4),
        (2, 4, 1), (1, 4, 2), (1, 8, 1),
    }  # fmt: skip
    speeds = [x.tokens_per_second for x in found]
    assert speeds == sorted(speeds, reverse=True)
    assert all(0 <= x.idle < 1 for x in found)
    smaller = search(model, config, PARTS, 8, 20)
    assert smaller == [x for x in found if x.memory <= 20 * GIB]
    assert 0 < len(smaller) < len(found)


def test_what_tune_would_refuse_is_not_found(model, config):
    packed = dataclasses.replace(config, backbone_precision="torchao-int8")
    assert {x.tp for x in search(model, packed, PARTS, 8, 1000)} == {1}
    few = dataclasses.replace(config, global_batch_size=2)
    assert max(x.dp for x in search(model, few, PARTS, 8, 1000)) == 2


def test_with_a_teacher_all_layers_are_in_stages_and_steps_wait_for_the_last():
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES["llama2-7b"]))
        shallow = EarlyExitModel(backbone, ExitConfig("8", "mlp"))
    config = TuneConfig(seq_length=2048, micro_batch_size=1, global_batch_size=64, tp=1)
    deepest = {}
    for loss in ("ce", "kl"):
        one = dataclasses.replace(config, loss=loss)
        deepest[loss] = max(x.pp for x in search(shallow, one, PARTS, 32, 1000))
    assert deepest == {"ce": 8, "kl": 32}
    account = account_of(shallow, config)
    distils = dataclasses.replace(config, loss="kl", pp=2)
    stages = [range(16), range(16, 32)]
    halves = [memory(account, distils, stage)["backbone"] for stage in stages]
    whole = memory(account, dataclasses.replace(distils, pp=1), range(8))["backbone"]
    head, embedding = 2 * account.head.values, 2 * account.embedding
    assert sum(halves) == pytest.approx(whole + head)  # both have a head
    assert halves[0] - halves[1] == pytest.approx(embedding)


def test_tensor_parallelism_and_the_sequence_divide_memory(model, config):
    account = account_of(model, config)
    whole = memory(account, config, range(32))
    split = dataclasses.replace(config, tp=2)
    half = memory(account, split, range(32))
    # Of an exit all but its norms.
    assert half["optimizer state"] == pytest.approx(whole["optimizer state"] / 2, rel=1e-4)
    assert half["activations"] < whole["activations"]
    sequence = memory(account, dataclasses.replace(split, sequence_parallel=True), range(32))
    assert sequence["hidden states"] == half["hidden states"] / 2
    assert sequence["activations"] == whole["activations"] / 2


def test_ranks_keep_the_maps_of_a_draft_exit_whole(config):
    """Its block and its head are divided: values, and seconds of each."""
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES["llama2-7b"]))
        model = EarlyExitModel(backbone, ExitConfig("", "draft", head="own"))
    account = account_of(model, config)
    exit, draft, hidden = account.exits[0], model.draft, 4096
    split = sum(p.numel() for part in (draft.block, draft.head) for p in part.parameters())
    maps = (1 + len(model.sources) + 2) * hidden**2
    assert exit.unsplit.values == pytest.approx(maps, rel=1e-3)
    assert exit.on_rank(2) == exit.unsplit.values + split / 2
    steps = config.draft_steps
    flop = 3 * 2 * hidden**2 * ((1 + len(model.sources)) + 2 * (steps - 1))
    assert exit.unsplit.flop == flop
    split = dataclasses.replace(config, tp=2)
    whole, half = (memory(account, one, range(32))["optimizer state"] for one in (config, split))
    assert half == pytest.approx(whole * exit.on_rank(2) / exit.on_rank(1))
    parts = Seconds(layer=0.0, exit=1.0, optimizer=0.0, unsplit=0.5)
    alone, both = (expected(account, one, parts).tokens_per_second for one in (config, split))
    assert both / alone == pytest.approx(1 / 0.75, rel=1e-2)


def test_plan_shows_the_best_layouts(tmp_path, capsys):
    llama = LlamaConfig(**SHAPES["llama2-7b"], architectures=["LlamaForCausalLM"])
    llama.save_pretrained(tmp_path)
    main(["plan", "--model", str(tmp_path), "--layers", "every:8", "--gpus", "8", "--tp", "2"])
    out = capsys.readouterr().out
    assert "best layouts of 8 GPUs" in out
    assert "8 × 1 × 1" in out
