"""A process reads from disk what it needs of the backbone, and no more."""

import subprocess
import sys

import pytest
from helpers.families import tiny

from ee_tuning.loading import Parts, load_backbone

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
