"""What a run of several processes does besides giving the same exits: `test_layouts` has that."""

import json
import subprocess
import sys

import pytest
import torch
from families import tiny
from transformers import AutoModelForCausalLM

from ee_tuning.data import SampleOrder, load_packed, micro_batches, split_validation
from ee_tuning.loading import Parts, load_backbone
from ee_tuning.losses import count_labels

ODD = {"layers": "2,5", "arch": "mlp,layer", "head": "own"}
VARIANTS = {
    "kl-tp": (2, {"tp": 2}, {"loss": "mixed", "kl_temperature": 2.0}),
    "kl-tp-sequence": (2, {"tp": 2, "sequence_parallel": True}, {"loss": "mixed"}),
    "kl-dp": (2, {"dp": 2}, {"loss": "kl"}),
    "random": (4, {"tp": 2, "pp": 2}, {"init": "random"}),
    "no-exit": (4, {"pp": 4, "stage_layers": [1, 1, 1, 2]}, {"layers": "2,5", **ODD}),
    "one-stage": (2, {"pp": 2}, {"layers": "4,5", "arch": "norm", "head": "own"}),
    "more-stages": (4, {"pp": 4}, {"layers": "5", "arch": "mlp", "head": "own"}),
    "vocabulary": (2, {"tp": 2}, {"exit_vocab": 200}),
    "shard-bf16": (4, {"dp": 2, "pp": 2, "shard": True}, {"precision": "bf16", "layers": "3",
        "arch": "norm", "head": "own", "micro_batch_size": 1, "dynamic_weights": False}),
    "measured": (2, {"pp": 2, "balance": "measured"}, {}),
    "warm-up": (2, {"pp": 2}, {"loss_weights": [1.0, 0.5, 2.0, 1.0], "loss_weight_warmup": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(new_runs, backbones, data):
    runs = new_runs()
    runs.add("part", 8, dp=2, tp=2, pp=2, steps=4, keep=2)
    for name, (size, layout, settings) in VARIANTS.items():
        runs.add(name, size, **layout, **settings)
        runs.add(f"{name}-one", **settings)
    completions = runs.root / "completions.jsonl"
    records = [{"prompt": "def " * (n % 9), "completion": "x" * (n % 5)} for n in range(1, 400)]
    completions.write_text("".join(json.dumps(record) + "\n" for record in records))
    runs.add("unequal", 4, dp=4, data=[str(completions)])
    runs.add("unequal-one", data=[str(completions)])
    # Of 300 logits a token, 150 here: 5 positions of 2 rows at a time.
    runs.add("chunks", 2, tp=2, logits=1500)
    runs.add("bf16", 4, tp=2, pp=2, precision="bf16")
    runs.add("bf16-one", precision="bf16")
    runs.add("sends", 2, pp=2, count=True, trace=True)
    runs.add("sends-sequence", 4, tp=2, pp=2, sequence_parallel=True, count=True)
    runs.add("ahead", 2, pp=2, ahead=True)
    runs.add("sums", 2, dp=2, count=True, trace=True)
    runs.add("sums-shard", 2, dp=2, shard=True, shard_backbone=True, count=True)
    runs.add("whole", 1, steps=4)
    bad = {
        "no-divisor": (2, {"pp": 1}), "too-deep": (2, {"pp": 2, "layers": "1", "arch": "mlp"}),
        "stage-layers": (2, {"pp": 2, "stage_layers": [1, 1]}),
        "heads": (4, {"tp": 4}), "kl-pp": (2, {"pp": 2, "loss": "kl"}),
        "fp8-tp": (2, {"tp": 2, "exit_precision": "fp8"}),
        "shard-tp": (2, {"tp": 2, "shard": True}),
        "shard-8": (2, {"dp": 2, "shard": True, "optimizer": "adamw-8bit"}),
        "few": (2, {"dp": 2, "global_batch_size": 1}),
        "no-gpu": (2, {"dp": 2, "device": "cuda:97"}),
        "no-plan": (2, {"tp": 2, "model": str(backbones / "gpt2")}),
    }  # fmt: skip
    for name, (size, settings) in bad.items():
        runs.add(name, size, **({"head": "own"} | settings))
    runs.add("other-settings", 2, dp=2, only_rank={1: {"lr": 0.5}})
    runs.add("other-paths", 2, dp=2, only_rank={1: {"data": [data + "l"], "model": "x"}})
    # The same relative paths, from folders of their own: other data, no data, a missing shard.
    folders = {"other-data": "one word more", "no-data": None, "missing-shard-pp": ""}
    for name, words in (folders | {"missing-shard-tp": "", "other-model-dp": None}).items():
        places = [runs.root / f"{name}-{rank}" for rank in (0, 1)]
        for place in places:
            place.mkdir()
            subprocess.run(["cp", data, place / "code.jsonl"], check=True)
            subprocess.run(["cp", "-r", backbones / "llama", place / "model"], check=True)
        if words:
            with (places[1] / "code.jsonl").open("a") as file:
                file.write(json.dumps({"text": words}) + "\n")
        if name == "no-data":
            (places[1] / "code.jsonl").unlink()
        if words == "":
            sorted((places[1] / "model").glob("*.safetensors"))[-1].unlink()
        if name == "other-model-dp":
            model = AutoModelForCausalLM.from_pretrained(places[1] / "model")
            model.model.layers[2].mlp.up_proj.weight.data += 0.01
            model.save_pretrained(places[1] / "model")
        axis = "dp" if "data" in name else name[-2:]
        given = {axis: 2, "data": ["code.jsonl"], "model": "model"}
        runs.add(name, 2, folders=list(map(str, places)), **given)
    runs.start()
    # One layout left off at step 4 of 4: pretend that it was cut off after 3, and go on elsewhere.
    for name in ("a", "b", "damaged"):
        subprocess.run(["cp", "-r", runs.root / "part", runs.root / name], check=True)
        subprocess.run(["rm", "-r", runs.root / name / "checkpoints/step-000004"], check=True)
    runs.add("b", 4, dp=1, tp=2, pp=2, steps=4, resume=True)
    runs.add("a", 1, steps=4, resume=True)
    (runs.root / "damaged/checkpoints/step-000003/exit-5.safetensors").unlink()
    runs.add("damaged", 2, dp=1, tp=1, pp=2, steps=4, resume=True)
    for name in ("whole", "vocabulary"):
        given = {"exits": str(runs.root / name), "layers": "", "arch": "mlp", "head": "own"}
        runs.add(f"{name}-on", 2, tp=2, **given)
        runs.add(f"{name}-on-one", **given)
    runs.start()
    return runs


def close(runs, one, many, tolerance):
    """Losses within a relative `tolerance`, weights within 2% of what AdamW's steps may move."""
    for a, b in zip(runs.records(one), runs.records(many), strict=True):
        assert a["step"] == b["step"]
        for key in a.keys() & {"loss", "grad_norm", "valid_loss"}:
            assert b[key] == pytest.approx(a[key], rel=tolerance), key
    expected, found = runs.tensors(one), runs.tensors(many)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert (value - found[name]).abs().max() < 0.02 * 3e-3, name
        else:
            assert torch.equal(value, found[name])


@pytest.mark.parametrize("name", [*VARIANTS, "chunks", "unequal"])
def test_settings_and_shapes_of_pipelines(runs, name):
    one = "measured" if name == "chunks" else name  # of the same settings
    close(runs, f"{one}-one", name, 1e-5)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_run_goes_on_under_another_layout(runs, name):
    close(runs, "whole", name, 1e-5)
    assert [r["step"] for r in runs.records(name) if "loss" in r] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["whole-on", "vocabulary-on"])
def test_saved_exits_are_tuned_on_in_slices(runs, name):
    close(runs, f"{name}-one", name, 1e-5)


def test_bf16_differs_by_its_rounding_only(runs):
    for a, b in zip(runs.records("bf16-one"), runs.records("bf16"), strict=True):
        for key in a.keys() & {"loss", "valid_loss"}:
            assert b[key] == pytest.approx(a[key], rel=2**-7), key
    assert runs.tensors("bf16")["4.head.weight"].dtype == torch.bfloat16


def in_steps(runs, name, rank):
    """What a rank sends and receives in each of the three steps: (operation, bytes, rank)."""
    found = runs.traffic(name, rank)
    return [[tuple(what) for number, *what in found if number == step] for step in (1, 2, 3)]


def test_stages_send_activations_forward_and_nothing_back(runs):
    """A global batch of 5 is 2 + 2 + 1 sequences of 32 tokens, 32 fp32 values each."""
    row = 32 * 32 * 4
    sent = [("send", rows * row, 1) for rows in (2, 2, 1)]
    received = [("recv", nbytes, 0) for _, nbytes, _ in sent]
    assert in_steps(runs, "sends", 0) == [sent] * 3
    assert in_steps(runs, "sends", 1) == [received] * 3
    # So it is in validation; else there are only numbers and hashes, from host to host.
    for rank, operation in enumerate(["send", "recv"]):
        outside = [what for number, *what in runs.traffic("sends", rank) if number == 0]
        stages = [what for what in outside if what[0] in ("send", "recv")]
        assert {what[0] for what in stages} == {operation}
        assert sum(nbytes for name, nbytes, _ in outside if name == "allreduce") < row


def test_with_sequence_parallelism_a_rank_sends_its_positions_alone(runs):
    whole = in_steps(runs, "sends", 0)
    for rank in (0, 1):
        steps = in_steps(runs, "sends-sequence", rank)
        sent = [[what for what in step if what[0] == "send"] for step in steps]
        assert sent == [[("send", n // 2, rank + 2) for _, n, _ in step] for step in whole]


def has_read(runs, name, rank):
    """Parameters of the backbone that a rank has, and whether a part of them: see `is_part`."""
    return json.loads((runs.root / f"{name}.traffic-{rank}.read").read_text())


def test_a_tensor_parallel_rank_reads_its_part_of_matrices_alone(runs):
    for rank in range(4):
        parts = [
            part for part in has_read(runs, "sends-sequence", rank).values() if part is not None
        ]
        assert len(parts) > 7  # matrices of attention and MLP, in two layers at least
        assert all(parts)


def test_a_stage_reads_its_own_layers_alone(runs):
    first, second = (has_read(runs, "sends", rank) for rank in (0, 1))
    assert "model.embed_tokens.weight" in first
    # Exits of both are made from the final norm, and from the head.
    assert first.keys() & second.keys() == {"model.norm.weight", "lm_head.weight"}
    layers = {name.split(".")[2] for name in first | second if ".layers." in name}
    assert layers == set("01234")


def test_a_stage_sends_on_before_it_works_on_its_exits(runs):
    """The first stage's exit work, which waits for that, would never begin."""
    assert runs.error("ahead") is runs.error("ahead", 1) is None
    assert (runs.root / "ahead.ahead").exists()


def test_ranks_have_unequal_numbers_of_tokens(runs, tokenizer):
    """What the run of that name is about: in every step some rank has more labels than another."""
    packed = load_packed([str(runs.root / "completions.jsonl")], tokenizer, 32, 0)
    packed, _ = split_validation(packed, 0.1, 0)
    order = SampleOrder(len(packed), 5, 0)
    for step in range(3):
        counts = [0] * 4
        for place, batch in enumerate(micro_batches(packed, order.indices(step), 1)):
            counts[place % 4] += int(count_labels(batch["labels"]))
        assert len(set(counts)) > 1


def test_the_timeline_of_a_step(runs):
    """Each stage's forward of a micro-batch begins after the one before ended; a chart is drawn."""
    events = json.loads((runs.root / "sends/trace.json").read_text())
    assert list(events) == ["rank 0 (pp 0, dp 0, tp 0)", "rank 1 (pp 1, dp 0, tp 0)"]
    first, second = events.values()
    assert {what for what, _, _ in first} <= {"forward", "exit work", "waiting"}
    assert {"forward", "exit work", "waiting"} == {what for what, _, _ in second}
    received = [stop for what, _, stop in second if what == "waiting"]
    forward = [stop for what, _, stop in first if what == "forward"]
    assert min(forward) < max(received)
    assert min(start for what, start, _ in second if what == "forward") > min(forward)
    waits = [what for own in events.values() for what, _, _ in own if what == "waiting"]
    assert len(waits) == 2 + 3 + 4  # for what was sent, three micro-batches, four exits' sums
    assert (runs.root / "sends/trace.png").read_bytes()[:4] == b"\x89PNG"


def test_data_parallel_ranks_exchange_gradients_of_exits(runs):
    """Each once a step, however many micro-batches; before them, the number of labels."""
    sizes = [value.nbytes for value in runs.tensors("sums", "exits.safetensors").values()]
    for rank in (0, 1):
        for (*count,), *sums in in_steps(runs, "sums", rank):
            assert count == ["allreduce", 8, 2]
            assert {(operation, ranks) for operation, _, ranks in sums} == {("allreduce", 2)}
            assert sorted(nbytes for _, nbytes, _ in sums) == sorted(sizes)


def test_with_shard_ranks_exchange_gradients_of_exits_once(runs):
    """All of them have a first dim that two ranks divide; norms' rows too."""
    sizes = [value.nbytes for value in runs.tensors("sums", "exits.safetensors").values()]
    for rank in (0, 1):
        for step in in_steps(runs, "sums-shard", rank):
            parts = sorted(nbytes for name, nbytes, _ in step if "reduce_scatter" in name)
            assert parts == sorted(nbytes // 2 for nbytes in sizes)


def test_with_shard_backbone_layers_are_gathered_for_every_micro_batch(runs):
    """Five layers of as many values; of two micro-batches rank 1 has one without labels."""
    for rank in (0, 1):
        for step in in_steps(runs, "sums-shard", rank):
            gathered = [nbytes for name, nbytes, _ in step if "gather" in name]
            assert len(gathered) == 5 * 2
            assert len(set(gathered)) == 1


def test_a_sum_of_gradients_goes_on_beside_the_next_exit(runs):
    """The last two exits' sums are waited for once all exits' losses are back-propagated."""
    events = json.loads((runs.root / "sums/trace.json").read_text())
    for own in events.values():
        work = [what for what, _, _ in sorted(own, key=lambda e: e[1]) if what != "forward"]
        assert work[-4:] == ["waiting", "exit work"] * 2
        assert work[-5] == "exit work"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-divisor", "dp 1 × tp 1 × pp 1 is 1, the number of processes is 2: start as many"),
        ("too-deep", "pp is 2: there are only 1 layers up to the deepest exit"),
        ("stage-layers", "stage_layers [1, 1] does not fit: give 2 numbers of layers"),
        ("heads", "tp is 4: it must divide the backbone's num_key_value_heads, 2"),
        ("kl-pp", "loss kl cannot be had with pp 2"),
        ("fp8-tp", "--exit-precision fp8 cannot be had with --tp"),
        ("no-gpu", "device 'cuda:97' cannot be used: "),
        ("few", "global_batch_size 1 is less than dp 2"),
        ("no-plan", "tensor-parallel plan for gpt2 does not exist"),
        ("other-settings", "rank 1 has other settings than rank 0"),
        ("other-paths", "rank 1 has other settings than rank 0"),
        ("other-data", "rank 1 has other data than rank 0"),
        ("other-model-dp", "rank 1 has another backbone than those before it, the layer 3 differs"),
        ("no-data", "code.jsonl does not exist"),
        ("missing-shard-pp", "cannot load the backbone model: "),
        ("damaged", "step-000003 is damaged (exit-5.safetensors: "),
        ("missing-shard-tp", "cannot load the backbone model: "),
    ],
)
def test_mistakes_are_refused_on_every_rank(runs, name, message):
    for rank in (0, 1):
        error = runs.error(name, rank)
        assert error is not None
        assert error.startswith("UserError: ")
        assert message in error.splitlines()[0]


MEASURE = """
import ctypes, gc, sys, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from ee_tuning.loading import Parts, Slices, load_backbone
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
slices = Slices(init_device_mesh("cpu", (4,)))
asked = eval(sys.argv[3])
load_backbone(sys.argv[2], Parts(frozenset([1])))  # what transformers imports on first use
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # freed memory that would be used again uncounted
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
model = load_backbone(sys.argv[1], **asked)
[p.sum() for p in model.parameters()]  # what was mapped is read at last
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""
ASKED = {  # what is loaded, and the largest matrix of it
    "stage": ("{'parts': Parts(frozenset([4, 5]), False, False)}", 512 * 1536 * 4),
    "slices": ("{'parts': Parts(frozenset(range(1, 7)), False), 'slices': slices}", 20000 * 2048),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_reads_its_own_tensors_alone(asked, tmp_path, backbones):
    """Peak memory of loading a stage, or a rank's part of four, against its size and the whole."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 20000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny("llama", num_hidden_layers=12, **sizes, **heads)
    model.save_pretrained(tmp_path, max_shard_size="40MB")
    total = sum(p.nbytes for p in model.parameters())
    code, largest = ASKED[asked]
    command = [sys.executable, "-c", MEASURE, tmp_path, backbones / "llama", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, own = map(int, done.stdout.split())
    assert own < total / 4
    # Pages of the files that lie beside what is read count too, while they are looked at.
    assert own * 0.9 < taken < 1.25 * own + largest + 2**23


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_without_embedding_and_head_ties_nothing(tied, tmp_path):
    tiny("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = load_backbone(str(tmp_path), Parts(frozenset([2]), False, False))
    names = [name for name, _ in model.named_parameters() if ".layers.1." not in name]
    assert names == ["model.norm.weight"]
