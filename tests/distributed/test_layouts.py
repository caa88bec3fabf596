"""Every layout of processes gives what a single process gives.

Tolerances: the same sums in another order, in fp32. Losses and gradient norms of all three steps
to 1e-5; gradients (AdamW's first moment after one step) to 1e-5 of the largest of a tensor;
weights after three steps to 2% of the learning rate per step, since AdamW's first steps divide a
gradient by its own size, however small that is.
"""

from math import prod

import pytest
import torch

LAYOUTS = {
    "dp2": {"dp": 2}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "pp4": {"pp": 4},
    "dp2-tp2": {"dp": 2, "tp": 2}, "dp2-pp2": {"dp": 2, "pp": 2}, "tp2-pp2": {"tp": 2, "pp": 2},
    "dp2-tp2-pp2": {"dp": 2, "tp": 2, "pp": 2}, "dp2-shard": {"dp": 2, "shard": True},
    "dp2-pp2-shard": {"dp": 2, "pp": 2, "shard": True},
    "dp2-tp2-shard": {"dp": 2, "tp": 2, "shard": True},
    "dp2-frozen": {"dp": 2, "shard": True, "shard_backbone": True},
    "dp2-tp2-frozen": {"dp": 2, "tp": 2, "shard_backbone": True},
    "tp2-sequence": {"tp": 2, "sequence_parallel": True},
    "tp2-pp2-sequence": {"tp": 2, "pp": 2, "sequence_parallel": True},
}  # fmt: skip
# How the others are cut into slices and stages: how gradients of exits are summed over dp, and
# sharded, does not depend on the backbone.
CUTS = [
    "tp2", "pp2", "tp2-pp2", "dp2-frozen", "dp2-tp2-frozen", "tp2-sequence", "tp2-pp2-sequence",
]  # fmt: skip
FAMILIES = {"llama": [*LAYOUTS], "tied": CUTS, "biased": CUTS}


@pytest.fixture(scope="module")
def runs(new_runs, backbones):
    runs = new_runs()
    sizes = {name: prod(int(n) for n in layout.values()) for name, layout in LAYOUTS.items()}
    for name in sorted(LAYOUTS, key=sizes.get, reverse=True):
        for family in (family for family, own in FAMILIES.items() if name in own):
            settings = LAYOUTS[name] | {"model": str(backbones / family)}
            runs.add(f"{family}-{name}", sizes[name], **settings)
    for family in FAMILIES:
        runs.add(f"{family}-one", model=str(backbones / family))
    runs.start()
    return runs


@pytest.mark.parametrize(
    ("family", "layout"), [(family, name) for family, own in FAMILIES.items() for name in own]
)
def test_equals_a_single_process(runs, family, layout):
    one, many = f"{family}-one", f"{family}-{layout}"
    for a, b in zip(runs.records(one), runs.records(many), strict=True):
        for key in a.keys() & {"loss", "grad_norm", "valid_loss"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
    for layer in (1, 4, 5):
        path = f"checkpoints/step-000001/optimizer-{layer}.safetensors"
        expected, found = runs.tensors(one, path), runs.tensors(many, path)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if name.endswith("exp_avg"):
                gap = (value - found[name]).abs().max()
                assert gap <= 1e-5 * value.abs().max() + 1e-9, name
    expected, found = runs.tensors(one), runs.tensors(many)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (value - found[name]).abs().max() < 0.02 * 3 * 1e-3, name
    config = "exit_config.json"
    a, b = ((runs.root / name / config).read_text() for name in (one, many))
    assert a == b


def test_the_layouts_are_compared_on_something_that_moves(runs):
    """Weights change by far more than what layouts may differ by, and clipping is at work."""
    first = runs.tensors("llama-one", "checkpoints/step-000001/exit-4.safetensors")
    last = runs.tensors("llama-one", "checkpoints/step-000003/exit-4.safetensors")
    assert all((first[name] - last[name]).abs().max() > 0.3e-3 for name in first)
    norms = [r["grad_norm"] for r in runs.records("llama-one") if "grad_norm" in r]
    assert any(norm > 0.005 for step in norms for norm in step.values())
    assert torch.isfinite(torch.tensor([list(step.values()) for step in norms])).all()
