"""On GPUs that let a kernel come onto the multiprocessors while the one before it ends."""

import re

import pytest
import torch
import torch._inductor.config
from helpers.families import tiny
from helpers.models import drafting
from helpers.prompts import prompt
from torch._inductor.graph import GraphLowering

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.passes.compiler import EARLY

ABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
KNOWN = EARLY in torch._inductor.config.get_config_copy()
pytestmark = pytest.mark.skipif(
    not (ABLE and KNOWN), reason="needs a GPU of compute capability 9 and a compiler that knows it"
)


@pytest.fixture
def kernels(monkeypatch):
    """Of the compiler: the sources of all that it makes in a test."""
    codes = []
    monkeypatch.setattr(GraphLowering, "save_output_code", codes.append)
    torch._dynamo.reset()

    def found():
        every = re.findall(r"\.triton\('\w+', '''(.*?)'''", "\n".join(codes), re.DOTALL)
        return [source for source in every if "'launch_pdl': True" in source]

    with torch._inductor.config.patch(force_disable_caches=True):
        yield found


def assert_all_wait(sources):
    """Each kernel, and of several in one each branch."""
    assert len(sources) > 10
    for source in sources:
        branches = re.split(r"if pid < ", source)
        firsts = [re.search(r"tl\.(load|store|atomic)|bucketize|gdc_wait", one) for one in branches]
        assert {one.group() for one in firsts if one} == {"gdc_wait"}, source


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_compiled_waits_before_it_reads_or_writes_anything(family, kernels):
    exits = ExitConfig("1,2,3", "mlp,layer,norm")
    model = EarlyExitModel.from_base(tiny(family).cuda().bfloat16(), exits).eval()
    ids = torch.tensor([prompt(9, 1)], device="cuda")
    common = {"max_new_tokens": 8, "eos_token_id": None, "compile": True, "exit_layers": [1, 3]}
    for mode in ("threshold", "speculative"):
        model.generate(ids, mode=mode, threshold=0.02, **common)
        model.generate(ids, mode=mode, threshold=0.02, do_sample=True, **common)
    assert_all_wait(kernels())


def test_rounds_of_a_draft_exit_wait_likewise(kernels):
    model = drafting().to("cuda", torch.bfloat16).eval()
    ids = torch.tensor([prompt(9, 1)], device="cuda")
    common = {"max_new_tokens": 12, "eos_token_id": None, "compile": True}
    model.generate(ids, mode="speculative", threshold=0.0, **common)
    assert_all_wait(kernels())
