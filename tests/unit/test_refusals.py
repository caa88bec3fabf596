"""Settings that cannot be had together are refused in one line that says why."""

import pytest
from helpers.families import tiny

from ee_tuning.backbone import Backbone, plan_of
from ee_tuning.config import TuneConfig
from ee_tuning.errors import UserError
from ee_tuning.parallel.tensor import check_splits
from ee_tuning.plan.check import check

REFUSED = [
    ({"exits": "old", "layers": "", "init": "copy"}, ["init is copy", "for new exits", "--exits"]),
    ({"exits": "old", "layers": "", "arch": "norm"}, ["arch is norm", "for new exits", "--exits"]),
    ({"exits": "old", "layers": "", "head": "own"}, ["head is own", "for new exits", "--exits"]),
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
    with pytest.raises(
        UserError,
        match=r"gpt2 cannot .*: attn\.c_attn in its layers is a Conv1D",
    ):
        check_splits(backbone, 2)


@pytest.mark.parametrize(
    ("family", "module", "reason"),
    [
        ("falcon", "self_attention.query_key_value", "not known to be queries, keys or values"),
        ("gpt_bigcode", "attn.c_attn", "not known to be queries, keys or values alone"),
        ("bitnet", "self_attn.attn_sub_norm", "parameters that lie between"),
        ("diffllama", "self_attn", "parameters that lie between"),
        ("gptj", "attention or MLP", "not one matrix that writes to the residual"),
    ],
)
def test_a_family_without_a_plan_is_split_or_the_module_in_the_way_is_named(family, module, reason):
    with pytest.raises(UserError, match=f"{family} cannot be split by --tp: {module} .*{reason}"):
        plan_of(Backbone(tiny(family)))
    for name in ("opt", "biogpt", "stablelm"):
        styles = list(plan_of(Backbone(tiny(name))).values())
        assert styles.count("rowwise") == 2
        assert styles.count("colwise") >= 4
