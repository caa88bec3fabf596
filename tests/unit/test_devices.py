"""What a GPU cannot compute in is refused in one line that says what to use instead."""

import pytest
import torch

from ee_tuning.config import TuneConfig
from ee_tuning.devices import check_precisions
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
