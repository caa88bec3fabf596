"""Settings that cannot be had together are refused in one line that says why."""

import pytest
from helpers.families import tiny

from ee_tuning.backbone import Backbone
from ee_tuning.config import TuneConfig
from ee_tuning.errors import UserError
from ee_tuning.parallel.tensor import check_splits
from ee_tuning.plan.check import check

REFUSED = [
    ({"exits": "old", "layers": "", "init": "copy"}, ["init is copy", "for new exits", "--exits"]),
    ({"shard": True}, ["--shard", "--dp 1", "no other rank"]),
    ({"shard_backbone": True}, ["--shard-backbone", "--dp 1", "no other rank"]),
    (
        {"dp": 2, "shard_backbone": True, "backbone_precision": "fp8"},
        ["--backbone-precision fp8", "--shard-backbone", "dtype of the checkpoint"],
    ),
    ({"sequence_parallel": True}, ["--sequence-parallel", "--tp 1", "no other rank"]),
    ({"sequence_parallel": True, "tp": 2, "seq_length": 33}, ["seq_length 33", "tp, 2"]),
    ({"balance": "measured"}, ["balance measured needs --pp"]),
    ({"balance": "measured", "pp": 2, "stage_layers": [2, 2]}, ["no --stage-layers"]),
    (
        {"tp": 2, "backbone_precision": "torchao-int8"},
        ["--backbone-precision torchao-int8", "--tp", "whole rows"],
    ),
    (
        {"dp": 2, "shard_backbone": True, "backbone_precision": "torchao-int8"},
        ["--backbone-precision torchao-int8", "--shard-backbone", "dtype of the checkpoint"],
    ),
    ({"trace": True, "steps": 1}, ["trace", "the second step"]),
    ({"stage_layers": [2, 2]}, ["stage_layers needs --pp"]),
    ({"dp": 8, "global_batch_size": 4}, ["global_batch_size 4", "dp 8"]),
]


@pytest.mark.parametrize(("settings", "parts"), REFUSED)
def test_what_cannot_be_combined(settings, parts):
    allowed = {"data": ["a.jsonl"], "layers": "4"}
    check(TuneConfig(**allowed))
    with pytest.raises(UserError) as refusal:
        check(TuneConfig(**allowed | settings))
    assert "\n" not in str(refusal.value)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("tp", "message"),
    [
        (5, "tp is 5: it must divide the backbone's vocab_size, 96"),
        (3, "num_attention_heads, 4"),
        (4, "num_key_value_heads, 2"),
    ],
)
def test_a_tensor_parallel_size_that_does_not_divide(tp, message):
    backbone = Backbone(tiny("llama"))
    check_splits(backbone, 2)
    with pytest.raises(UserError, match=message):
        check_splits(backbone, tp)


def test_what_has_no_plan_has_one_part():
    backbone = Backbone(tiny("gpt2"))
    check_splits(backbone, 1)
    with pytest.raises(UserError, match="plan for gpt2 does not exist: use --tp 1"):
        check_splits(backbone, 2)
