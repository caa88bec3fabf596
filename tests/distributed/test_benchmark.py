"""benchmarks/parallel.py as torchrun starts it, which runs the command's own step on GPUs, too."""

import json
import sys

import parallel
import pytest
from helpers.commands import PATIENCE
from helpers.forks import fork, torchrun

FLAGS = [
    "--shape", "tiny", "--seq-length", "32", "--micro-batch-size", "2", "--device", "cpu",
    "--global-batch-size", "8", "--layers", "1,2,3,4", "--warmup", "1",
]  # fmt: skip


def measure(*flags):
    """A rank: the script with these flags."""
    sys.argv = ["parallel.py", *flags]
    parallel.main()


def test_layouts_are_measured_against_one_process(tmp_path):
    """Losses and norms in fp32 within 1e-4: sums in another order, over four steps."""
    layouts = {"one": 1, "dp2": 2, "tp2": 2, "tp2-sequence": 2, "pp2": 2}
    flags = [
        *FLAGS, "--layouts", ",".join(layouts), "--steps", "1", "--check", "1e-4",
        "--out", str(tmp_path / "found.json"),
    ]  # fmt: skip
    process = fork(tmp_path / "said", torchrun, 2, 0, measure, *flags)
    assert process.wait(PATIENCE) == 0, process.said
    assert "every layout gives one process's losses and norms within 0.0001" in process.said
    found = json.loads((tmp_path / "found.json").read_text())["layouts"]
    assert list(found) == list(layouts)
    for name, processes in layouts.items():
        one = found[name]
        assert len(one["peak_gib"]) == processes
        rate = one["tokens_per_second"]["median"]
        assert rate == pytest.approx(8 * 32 / one["seconds"][0], rel=0.01)
        assert one["efficiency"] == pytest.approx(one["speedup"] / processes, abs=1e-3)
        idle = one["idle"]
        assert 0 <= idle["measured"] < 1
        assert min(idle["seconds"], idle["simulated_seconds"]) > 0
        assert len(one["losses"]) == len(one["norms"]) == 4
        assert all(len(step) == 4 and min(step) > 1 for step in one["losses"])
    assert found["dp2"]["idle"]["ideal"] == 0 < found["pp2"]["idle"]["ideal"] < 0.5
    assert found["one"]["losses"][-1] < found["one"]["losses"][0]


def one_process(monkeypatch, *flags):
    """The script in this process."""
    for name in ("WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("sys.argv", ["", *FLAGS, "--steps", "1", *flags])
    parallel.main()


def test_one_process_may_have_been_measured_before(tmp_path, monkeypatch):
    """Compared with what the earlier file has, to the digit; `plan`'s word on a GPU it knows."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    one_process(monkeypatch, "--layouts", "one", "--out", str(before))
    earlier = json.loads(before.read_text())
    assert "plan" not in earlier["layouts"]["one"]
    earlier["layouts"]["one"]["tokens_per_second"]["median"] = 1
    before.write_text(json.dumps(earlier))
    monkeypatch.setattr(parallel, "hardware", lambda _: "NVIDIA H100 80GB HBM3")
    layouts = "dp1,dp1-batch4"
    one_process(monkeypatch, "--layouts", layouts, "--one", str(before), "--out", str(after))
    found = json.loads(after.read_text())["layouts"]
    assert found["dp1"]["speedup"] == found["dp1"]["tokens_per_second"]["median"]
    assert found["dp1"]["losses_differ_by"] == 0
    assert "speedup" not in found["dp1-batch4"]
    assert 0 < found["dp1"]["plan"]["gib"] < 0.1
    assert found["dp1"]["plan"]["tokens_per_second"] > 0 == found["dp1"]["plan"]["idle"]


def test_losses_that_differ_fail_the_check(monkeypatch):
    """Nothing differs by less than nothing."""
    with pytest.raises(SystemExit, match=r"one is not within -1.0 of one process: \[0.0, 0.0\]"):
        one_process(monkeypatch, "--layouts", "one", "--check=-1")
