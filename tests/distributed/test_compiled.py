"""Compiled layers and exits of tensor-parallel ranks give what one process gives.

Without the code generator, which takes a minute for a CPU: what is traced is what counts here.
"""

import pytest
from helpers.runs import close

LAYOUTS = {"tp2": {}, "tp2-sequence": {"sequence_parallel": True}}


@pytest.fixture(scope="module")
def runs(new_runs):
    runs = new_runs()
    common = {"layers": "1", "arch": "mlp", "head": "own", "steps": 2, "global_batch_size": 4}
    for name, layout in LAYOUTS.items():
        runs.add(name, 2, tp=2, compile="on", backend="aot_eager", **layout, **common)
    runs.add("one", compile="off", **common)
    runs.start()
    return runs


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_ranks_give_what_one_process_gives(runs, name):
    close(runs, "one", name, 1e-5)
