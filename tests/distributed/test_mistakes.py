"""What is refused, in the same words on every rank."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from ee_tuning.folders import sole_writer

BAD = {
    "no-divisor": (2, {"pp": 1}), "too-deep": (2, {"pp": 2, "layers": "1", "arch": "mlp"}),
    "stage-layers": (2, {"pp": 2, "stage_layers": [1, 1]}),
    "heads": (4, {"tp": 4}),
    "int8-tp": (2, {"tp": 2, "backbone_precision": "torchao-int8"}),
    "few": (2, {"dp": 2, "global_batch_size": 1}),
    "no-gpu": (2, {"dp": 2, "device": "cuda:97"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(new_runs, backbones, data):
    runs = new_runs()
    for name, (size, settings) in BAD.items():
        runs.add(name, size, **({"head": "own"} | settings))
    runs.add("no-plan", 2, head="own", tp=2, model=str(backbones / "gpt2"))
    runs.add("other-settings", 2, dp=2, only_rank={1: {"lr": 0.5}})
    runs.add("other-paths", 2, dp=2, only_rank={1: {"data": [data + "l"], "model": "x"}})
    for name, (axis, change) in CHANGES.items():
        folders = [runs.root / f"{name}-{rank}" for rank in (0, 1)]
        for folder in folders:
            folder.mkdir()
            shutil.copy(data, folder / "code.jsonl")
            shutil.copytree(backbones / "llama", folder / "model")
        change(folders[1])
        same = {axis: 2, "data": ["code.jsonl"], "model": "model"}
        runs.add(name, 2, folders=list(map(str, folders)), **same)
    runs.add("written-to", 2, dp=2)
    (runs.root / "written-to").mkdir()
    with sole_writer(runs.root / "written-to"):
        runs.start()
    return runs


def add_a_record(folder):
    with (folder / "code.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one word more"}) + "\n")


def remove_the_data(folder):
    (folder / "code.jsonl").unlink()


def remove_a_shard(folder):
    max((folder / "model").glob("*.safetensors")).unlink()


def change_a_layer(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.model.layers[2].mlp.up_proj.weight.data += 0.01
    model.save_pretrained(folder / "model")


# The same relative paths, from folders of their own, are something else on the second rank.
CHANGES = {
    "other-data": ("dp", add_a_record),
    "no-data": ("dp", remove_the_data),
    "missing-shard-pp": ("pp", remove_a_shard),
    "missing-shard-tp": ("tp", remove_a_shard),
    "other-model-dp": ("dp", change_a_layer),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-divisor", "dp 1 × tp 1 × pp 1 is 1, the number of processes is 2: start as many"),
        ("too-deep", "pp is 2: there are only 1 layers up to the deepest exit"),
        ("stage-layers", "stage_layers [1, 1] does not fit: give 2 numbers of layers"),
        ("heads", "tp is 4: it must divide the backbone's num_key_value_heads, 2"),
        ("int8-tp", "--backbone-precision torchao-int8 cannot be had with --tp"),
        ("no-gpu", "device 'cuda:97' cannot be used: "),
        ("few", "global_batch_size 1 is less than dp 2"),
        (
            "no-plan",
            "gpt2 cannot be split by --tp: attn.c_attn in its layers is a Conv1D; use --tp 1",
        ),
        ("other-settings", "rank 1 has other settings than rank 0"),
        ("other-paths", "rank 1 has other settings than rank 0"),
        ("other-data", "rank 1 has other data than rank 0"),
        ("other-model-dp", "rank 1 has another layer 3 of the backbone than those before it"),
        ("written-to", "another run writes to "),
        ("no-data", "code.jsonl does not exist"),
        ("missing-shard-pp", "cannot load the backbone model: "),
        ("missing-shard-tp", "cannot load the backbone model: "),
    ],
)
def test_mistakes_are_refused_on_every_rank(runs, name, message):
    for rank in (0, 1):
        error = runs.error(name, rank)
        assert error is not None
        assert error.startswith("UserError: ")
        assert message in error.splitlines()[0]
