"""Decoding over two GPUs, through NCCL, gives what one gives."""

import pytest
import torch
from helpers import launch_decoding
from helpers.families import tiny

from ee_tuning import EarlyExitModel, ExitConfig

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
DEVICE = "cuda"
CALLS = [
    call | {"max_new_tokens": 12, "eos_token_id": None}
    for call in (
        {"mode": "full"},
        {"threshold": 0.0, "alone": True},
        {"threshold": 0.5},
        {"threshold": 0.5, "do_sample": True, "alone": True},
    )
]
LAYOUTS = {
    "pp2": ({"pp": 2}, {"compile": False}),
    "pp2-compiled": ({"pp": 2}, {"compile": True}),
    "tp2": ({"tp": 2}, {"compile": False}),
    "tp2-compiled": ({"tp": 2}, {"compile": True}),
}


def test_two_gpus_give_what_one_gives(tmp_path):
    """In fp32, so that rounding does not turn a token."""
    tiny("llama").save_pretrained(tmp_path / "model")
    model = EarlyExitModel.from_base(
        str(tmp_path / "model"), ExitConfig("1,2,3", arch=["norm", "mlp", "layer"])
    ).eval()
    for layer in model.exit_layers:
        model.exit(layer).head.weight.data.mul_(8)
    model.save_pretrained(tmp_path / "exits")
    common = {"tp": 1, "pp": 1, "todo": "generate", "exits": str(tmp_path / "exits")}
    cases = [
        {"name": name, **common, **layout, "device": DEVICE, "calls": [c | more for c in CALLS]}
        for name, (layout, more) in LAYOUTS.items()
    ]
    cases += [{"name": "sums", **common, "tp": 2, "todo": "sums", "device": DEVICE, "calls": []}]
    said = launch_decoding.start(cases, tmp_path)
    model = model.to(DEVICE)
    expected = launch_decoding.generate(model, [call | {"compile": False} for call in CALLS])
    for name in LAYOUTS:
        for rank in (0, 1):
            error = tmp_path / f"{name}-{rank}.error"
            assert not error.exists(), error.read_text() + said
            outputs = torch.load(tmp_path / f"{name}-{rank}.pt")["found"]
            for out, wanted in zip(outputs, expected, strict=True):
                assert torch.equal(out["sequences"], wanted["sequences"]), name
                assert torch.equal(out["exit_layers"], wanted["exit_layers"]), name
    assert not (tmp_path / "sums-0.error").exists(), said
    plain, shared = torch.load(tmp_path / "sums-0.pt")["found"]
    assert all(torch.equal(*both) for both in zip(plain, shared, strict=True))
