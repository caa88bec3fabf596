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


@pytest.fixture(scope="module")
def exits(tmp_path_factory):
    """Exits of three architectures on a backbone beside them."""
    folder = tmp_path_factory.mktemp("exits")
    tiny("llama").save_pretrained(folder / "model")
    model = EarlyExitModel.from_base(
        str(folder / "model"), ExitConfig("1,2,3", arch=["norm", "mlp", "layer"])
    ).eval()
    for layer in model.exit_layers:
        model.exit(layer).head.weight.data.mul_(8)
    model.save_pretrained(folder / "exits")
    return str(folder / "exits")


def ranks(exits, tmp_path, todo, calls, **layout):
    """What each of two ranks found."""
    case = {"tp": 1, "pp": 1, "name": todo, "todo": todo, "exits": exits, "device": DEVICE}
    said = launch_decoding.start([case | layout | {"calls": calls}], tmp_path)
    for rank in (0, 1):
        error = tmp_path / f"{todo}-{rank}.error"
        assert not error.exists(), error.read_text() + said
        yield torch.load(tmp_path / f"{todo}-{rank}.pt")["found"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("layout", ["pp", "tp"])
def test_two_gpus_give_what_one_gives(exits, tmp_path, layout, compiled):
    """In fp32, so that rounding does not turn a token."""
    model = EarlyExitModel.from_pretrained(exits, device=DEVICE).eval()
    expected = launch_decoding.generate(model, [call | {"compile": False} for call in CALLS])
    calls = [call | {"compile": compiled} for call in CALLS]
    for outputs in ranks(exits, tmp_path, "generate", calls, **{layout: 2}):
        for out, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(out["sequences"], wanted["sequences"])
            assert torch.equal(out["exit_layers"], wanted["exit_layers"])


def test_sums_by_way_of_memory_are_nccls(exits, tmp_path):
    for plain, shared in ranks(exits, tmp_path, "sums", [], tp=2):
        assert all(torch.equal(*both) for both in zip(plain, shared, strict=True))
