"""Settings and shapes of runs of several processes, and how they go on: as one process."""

import json
import shutil

import pytest
import torch
from helpers.runs import close

from ee_tuning.data import SampleOrder, load_packed, micro_batches, split_validation
from ee_tuning.losses import count_labels
from ee_tuning.tune.optimizers import cuts_no_block

ODD = {"layers": "2,5", "arch": "mlp,layer", "head": "own"}
VARIANTS = {
    "kl-tp": (2, {"tp": 2}, {"loss": "mixed", "kl_temperature": 2.0}),
    "kl-tp-sequence": (2, {"tp": 2, "sequence_parallel": True}, {"loss": "mixed"}),
    "kl-dp": (2, {"dp": 2}, {"loss": "kl"}),
    "fitted-sequence": (2, {"tp": 2, "sequence_parallel": True}, {"init": "fitted",
        "layers": "2,4", "arch": "mlp,layer", "head": "own,shared"}),
    "random": (4, {"tp": 2, "pp": 2}, {"init": "random"}),
    "no-exit": (4, {"pp": 4, "stage_layers": [1, 1, 1, 2]}, {"layers": "2,5", **ODD}),
    "one-stage": (2, {"pp": 2}, {"layers": "4,5", "arch": "norm", "head": "own"}),
    "more-stages": (4, {"pp": 4}, {"layers": "5", "arch": "mlp", "head": "own"}),
    "fp8-tp": (2, {"tp": 2}, {"backbone_precision": "fp8", "head": "shared,shared,own,own"}),
    "fp8-tp-sequence": (2, {"tp": 2, "sequence_parallel": True}, {"backbone_precision": "fp8"}),
    "vocabulary-mixed": (2, {"tp": 2}, {"exit_vocab": 200, "loss": "mixed"}),
    "vocabulary-acceptance": (4, {"tp": 2, "pp": 2}, {"exit_vocab": 200, "loss": "acceptance"}),
    "vocabulary": (2, {"tp": 2}, {"exit_vocab": 200}),
    "shard-bf16": (4, {"dp": 2, "pp": 2, "shard": True}, {"precision": "bf16", "layers": "3",
        "arch": "norm", "head": "own", "micro_batch_size": 1, "dynamic_weights": False}),
    "shard-tp-sequence": (4, {"dp": 2, "tp": 2, "shard": True, "sequence_parallel": True}, {}),
    "measured": (2, {"pp": 2, "balance": "measured"}, {}),
    "warm-up": (2, {"pp": 2}, {"loss_weights": [1.0, 0.5, 2.0, 1.0], "loss_weight_warmup": 4}),
    "kl-pp": (4, {"pp": 4}, {"loss": "mixed", "layers": "1,3,4", "arch": "mlp,layer,norm",
        "head": "own,shared,own", "micro_batch_size": 1}),
    "acceptance-pp": (4, {"pp": 2, "dp": 2}, {"loss": "acceptance", "layers": "2,3", "arch": "mlp",
        "head": "own", "init": "fitted", "exit_vocab": 200}),
    "kl-tp-pp": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}, {"loss": "kl", "layers": "1,4",
        "arch": "mlp", "head": "own"}),
    "draft-pp": (4, {"pp": 4}, {"layers": "0,2", "arch": "draft,mlp", "head": "shared,own",
        "draft_sources": "1,2,4", "draft_steps": 3, "loss": "acceptance"}),
    "draft-tp": (2, {"tp": 2}, {"layers": "0,2", "arch": "draft,mlp", "head": "own",
        "exit_vocab": 200, "draft_sources": "1,2,4", "draft_steps": 3, "loss": "acceptance"}),
    "draft-tp-shard-sequence": (4, {"tp": 2, "dp": 2, "shard": True, "sequence_parallel": True},
        {"layers": "", "arch": "draft", "head": "shared", "draft_steps": 2, "loss": "kl",
        "init": "copy"}),
    "eagle3-tp": (2, {"tp": 2, "sequence_parallel": True}, {"layers": "", "arch": "eagle3",
        "head": "own", "draft_sources": "1,2,4", "draft_steps": 2, "loss": "kl"}),
    "draft-alone-pp": (2, {"pp": 2}, {"layers": "", "arch": "draft", "head": "shared",
        "draft_steps": 2}),
}  # fmt: skip
NO_PLAN = [("stablelm", "stablelm", {"sequence_parallel": True}), ("opt", "opt", {})]
# The head's state, of 256 × 32 values, is in blocks; the rest is too small for that.
EIGHT_BIT = {"optimizer": "adamw-8bit", "exit_vocab": 256, "layers": "3", "arch": "norm",
    "head": "own", "clip": 0.0}  # fmt: skip

EIGHT_BIT_MLP = EIGHT_BIT | {"layers": "2,3", "arch": "mlp", "clip": 0.005}
# Split over ranks: every matrix in blocks, or the MLP's second one across them.
EIGHT_BIT_SPLIT = {
    "8bit-blocks-one": (1, {"model": "blocks"}),
    "8bit-blocks-tp": (2, {"tp": 2, "model": "blocks"}),
    "8bit-blocks-tp-shard": (4, {"tp": 2, "dp": 2, "shard": True, "model": "blocks"}),
    "8bit-cut-blocks-one": (1, {"model": "cut-blocks"}),
    "8bit-cut-blocks-tp": (2, {"tp": 2, "model": "cut-blocks"}),
}  # fmt: skip
# By name: the run that is gone on from, and how.
EIGHT_BIT_ON = [
    ("8bit-blocks-on", "8bit-blocks-one", 2, {"tp": 2}),
    ("8bit-cut-blocks-on-one", "8bit-cut-blocks-tp", 1, {"tp": 1}),
]


@pytest.fixture(scope="module")
def runs(new_runs, backbones):
    """Runs by the names above, and "-one" for the same settings in one process."""
    runs = new_runs()
    runs.add("part", 8, dp=2, tp=2, pp=2, steps=4, keep=2)
    for name, (size, layout, settings) in VARIANTS.items():
        settings = {"save_every": 3} | settings
        runs.add(name, size, **layout, **settings)
        runs.add(f"{name}-one", **settings)
    completions = write_completions(runs.root / "completions.jsonl")
    runs.add("unequal", 4, dp=4, data=[completions])
    runs.add("unequal-one", data=[completions])
    # Of 300 logits a token, 150 here: 12 positions of 2 rows at a time.
    runs.add("chunks", 2, tp=2, logits=3600)
    runs.add("bf16", 4, tp=2, pp=2, precision="bf16")
    runs.add("bf16-one", precision="bf16")
    in_fp8 = {"exit_precision": "fp8", "layers": "2", "arch": "mlp", "head": "own"}
    runs.add("exit-fp8", 2, tp=2, **in_fp8)
    runs.add("exit-fp8-one", **in_fp8)
    runs.add("whole", 1, steps=4)
    for name, shard in (("8bit", False), ("8bit-shard", True)):
        runs.add(name, 2, dp=2, shard=shard, backend="eager", **EIGHT_BIT)
    for name, family, layout in NO_PLAN:
        runs.add(name, 2, tp=2, model=str(backbones / family), **layout)
        runs.add(f"{name}-one", model=str(backbones / family))
    for name, (size, layout) in EIGHT_BIT_SPLIT.items():
        path = str(backbones / layout["model"])
        # Tracing torchao's step takes every rank seconds: once of sharded and once of split ones.
        backend = "eager" if name == "8bit-blocks-tp" else None
        runs.add(name, size, backend=backend, **EIGHT_BIT_MLP | layout | {"model": path})
    runs.start()
    return runs


@pytest.fixture(scope="module")
def going_on(runs, backbones):
    """The same after others have gone on from what those left."""
    cut_off_before_the_last_step(runs.root / "8bit-shard", runs.root / "8bit-whole", 3)
    runs.add("8bit-whole", 2, dp=2, shard=False, resume=True, backend="eager", **EIGHT_BIT)
    for name, before, size, layout in EIGHT_BIT_ON:
        cut_off_before_the_last_step(runs.root / before, runs.root / name, 3)
        backbone = {"model": str(backbones / EIGHT_BIT_SPLIT[before][1]["model"])}
        again = EIGHT_BIT_MLP | layout | backbone | {"resume": True}
        runs.add(name, size, backend=None, **again)
    for name in ("a", "b", "damaged"):
        cut_off_before_the_last_step(runs.root / "part", runs.root / name)
    (runs.root / "damaged/checkpoints/step-000003/exit-5.safetensors").unlink()
    runs.add("b", 4, dp=1, tp=2, pp=2, steps=4, resume=True)
    runs.add("a", 1, steps=4, resume=True)
    runs.add("damaged", 2, dp=1, tp=1, pp=2, steps=4, resume=True)
    for name in ("whole", "vocabulary"):
        tuned_on = {"exits": str(runs.root / name), "layers": "", "arch": "mlp", "head": "auto"}
        runs.add(f"{name}-on", 2, tp=2, **tuned_on)
        runs.add(f"{name}-on-one", **tuned_on)
    runs.start()
    return runs


def write_completions(path):
    """Records of very unequal numbers of labels."""
    records = [{"prompt": "def " * (n % 9), "completion": "x" * (n % 5)} for n in range(1, 400)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def cut_off_before_the_last_step(run, copy, steps=4):
    """A copy of a run of so many steps as if it had been cut off before the last."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / f"checkpoints/step-{steps:06d}")


@pytest.mark.parametrize("name", [*VARIANTS, "chunks", "unequal", "stablelm", "opt"])
def test_settings_and_shapes_of_pipelines(runs, name):
    one = "measured" if name == "chunks" else name  # of the same settings
    close(runs, f"{one}-one", name, 1e-5)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_run_goes_on_under_another_layout(going_on, name):
    close(going_on, "whole", name, 1e-5)
    assert [r["step"] for r in going_on.records(name) if "loss" in r] == [1, 2, 3, 4]


def test_8_bit_state_is_sharded_along_its_blocks(going_on):
    """Bit for bit what ranks find that each have all of it, also where it goes on so: a sum of two
    ranks' gradients is the same either way. (A norm to clip by would be another sum.)"""
    path = "checkpoints/step-000003/optimizer-3.safetensors"
    for at in (path, "exits.safetensors"):
        whole, *others = (
            going_on.tensors(name, at) for name in ("8bit", "8bit-shard", "8bit-whole")
        )
        for other in others:
            assert whole.keys() == other.keys()
            assert all(torch.equal(whole[name], other[name]) for name in whole)
    assert {"head.weight:exp_avg:codes", "head.weight:exp_avg:scale"} <= going_on.tensors(
        "8bit-shard", path
    ).keys()


@pytest.mark.parametrize("name", [n for n in EIGHT_BIT_SPLIT if not n.endswith("one")])
def test_8_bit_state_is_split(runs, name):
    """In the blocks that one process has, or, where these would be cut, as it is."""
    one = f"{name.partition('-tp')[0]}-one"
    close(runs, one, name, 1e-5)
    path = "checkpoints/step-000003/optimizer-2.safetensors"
    expected, found = runs.tensors(one, path), runs.tensors(name, path)
    assert "mlp.mlp.down_proj.weight:exp_avg:scale" in expected
    alike = {key for key in expected if key.endswith((":codes", ":scale")) and key in found}
    assert len(alike) == (12 if "cut" in name else 16)
    assert (expected.keys() == found.keys()) == ("cut" not in name)
    for key in alike:
        assert found[key].shape == expected[key].shape
        # Gradients are sums in another order, and around 0 codes lie close to each other.
        bounds = {"atol": 8, "rtol": 0} if key.endswith(":codes") else {"atol": 0, "rtol": 1e-3}
        torch.testing.assert_close(found[key].float(), expected[key].float(), **bounds, msg=key)


@pytest.mark.parametrize(("name", "before"), [(name, before) for name, before, *_ in EIGHT_BIT_ON])
def test_8_bit_state_goes_on_split_otherwise(going_on, name, before):
    close(going_on, before, name, 1e-5)


@pytest.mark.parametrize("size", [4096, 8192, 3 * 4096, 1000, 8192 + 128])
@pytest.mark.parametrize("parts", [2, 4])
def test_state_is_cut_where_its_parts_have_the_blocks_of_the_whole(size, parts):
    """As torchao decides, which quantises what has 4096 values or more, in blocks of 256."""
    in_blocks = [n >= 4096 and n % 256 == 0 for n in (size, size // parts)]
    assert cuts_no_block(torch.empty(size), parts) == (in_blocks[0] == in_blocks[1])


@pytest.mark.parametrize("name", ["whole-on", "vocabulary-on"])
def test_saved_exits_are_tuned_on_in_slices(going_on, name):
    close(going_on, f"{name}-one", name, 1e-5)


def test_bf16_differs_by_its_rounding_only(runs):
    for a, b in zip(runs.records("bf16-one"), runs.records("bf16"), strict=True):
        for key in a.keys() & {"loss", "valid_loss"}:
            assert b[key] == pytest.approx(a[key], rel=2**-7), key
    assert runs.tensors("bf16")["4.head.weight"].dtype == torch.bfloat16


def test_exits_in_fp8_differ_by_its_rounding_only(runs):
    """Where a matrix is cut along its rows, each part is rounded with scales of its own."""
    for a, b in zip(runs.records("exit-fp8-one"), runs.records("exit-fp8"), strict=True):
        for key in a.keys() & {"loss", "valid_loss"}:
            assert b[key] == pytest.approx(a[key], rel=2**-6), key


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_checkpoint_is_refused_on_every_rank(going_on, rank):
    error = going_on.error("damaged", rank)
    assert error.startswith("UserError: ")
    assert "step-000003 is damaged (exit-5.safetensors: " in error.splitlines()[0]


def test_ranks_have_unequal_numbers_of_tokens(runs, tokenizer):
    """What the run of that name is about: in every step some rank has more labels than another."""
    packed = load_packed([str(runs.root / "completions.jsonl")], tokenizer, 32, 0)
    packed, _ = split_validation(packed, 0.1, 0)
    order = SampleOrder(packed, 5, 0)
    for step in range(3):
        counts = [0] * 4
        for place, batch in enumerate(micro_batches(packed, order.indices(step), 1)):
            counts[place % 4] += int(count_labels(batch["labels"]))
        assert len(set(counts)) > 1
