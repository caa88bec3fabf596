"""What a GPU cannot compute in is refused in one line that says what to use instead."""

import pytest
import torch

from ee_tuning.config import TuneConfig
from ee_tuning.devices import check_precisions, pick_device
from ee_tuning.errors import UserError

REFUSED = [
    ((7, 5), {}, ["bf16", "7.5", "8.0", "--precision fp32"]),
    ((7, 0), {"precision": "bf16"}, ["bf16", "7.0", "--precision fp32"]),
    (
        (7, 5),
        {"precision": "fp32", "exit_precision": "fp8"},
        ["fp8", "8.9", "--exit-precision same"],
    ),
    ((8, 0), {"backbone_precision": "fp8"}, ["fp8", "8.0", "--backbone-precision torchao-int8"]),
    ((8, 6), {"exit_precision": "fp8"}, ["fp8", "8.6", "8.9", "--exit-precision same"]),
]
ALLOWED = [
    ((7, 5), {"precision": "fp32"}),
    ((8, 0), {"backbone_precision": "torchao-int8"}),
    ((8, 9), {"backbone_precision": "fp8", "exit_precision": "fp8"}),
    ((9, 0), {"backbone_precision": "fp8", "exit_precision": "fp8"}),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    def of(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")

    return of


@pytest.mark.parametrize(("capability", "settings", "parts"), REFUSED)
def test_refused(capability, settings, parts, gpu):
    gpu(capability)
    with pytest.raises(UserError) as refusal:
        check_precisions(TuneConfig(**settings), CUDA)
    assert "\n" not in str(refusal.value)
    for part in ("Some GPU", *parts):
        assert part in str(refusal.value)


@pytest.mark.parametrize(("capability", "settings"), ALLOWED)
def test_allowed(capability, settings, gpu):
    gpu(capability)
    check_precisions(TuneConfig(**settings), CUDA)


def test_a_cpu_computes_in_all_of_them():
    settings = {"precision": "bf16", "backbone_precision": "fp8", "exit_precision": "fp8"}
    check_precisions(TuneConfig(**settings), torch.device("cpu"))


@pytest.mark.parametrize("name", ["foo", "gpu", "CPU", "cuda:x", "cuda:-1", ""])
def test_what_is_no_device_is_told_what_may_be_given(name):
    with pytest.raises(UserError) as refusal:
        pick_device(name)
    said = f"device {name!r} is unknown: give cpu, cuda, cuda:1 for the second GPU, or auto"
    assert str(refusal.value) == said


@pytest.mark.parametrize(
    ("name", "rank", "missing"),
    [("cuda:2", None, 2), ("cuda:9", None, 9), ("cuda:300", None, 300), ("cuda", "3", 3)],
)
def test_a_gpu_that_is_not_there(name, rank, missing, monkeypatch):
    """rank: of a process of this machine, which takes the GPU of its number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(UserError) as refusal:
        pick_device(name)
    assert str(refusal.value) == (
        f"device {name!r} cannot be used: there is no cuda:{missing}, the last GPU here is cuda:1"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "cuda:300"])
def test_without_a_gpu(name):
    with pytest.raises(UserError) as refusal:
        pick_device(name)
    said = str(refusal.value)
    assert said.startswith(f"device {name!r} cannot be used: ")
    assert said.endswith("; use --device cpu")
    assert len(said) < 120
    assert pick_device("auto") == torch.device("cpu")


def test_a_device_that_holds_no_numbers():
    with pytest.raises(UserError, match=r"device 'meta' cannot be used: .*; use --device cpu"):
        pick_device("meta")
