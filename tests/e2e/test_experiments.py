"""`benchmarks/experiments.py` on a tiny model: its tables, and that nothing is run twice."""

import json
import shutil
import sys
from pathlib import Path

import experiments
import pytest
import tuned


@pytest.fixture(scope="module")
def flags(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("experiments")
    return [
        "--model", base, "--data", data, "--valid-data", data, "--layers", "1,2,3", "--steps", "4",
        "--seq-length", "32", "--batch", "2", "--out", str(out),
    ]  # fmt: skip


def run(monkeypatch, flags, *more):
    monkeypatch.setattr(sys, "argv", ["experiments.py", *flags, *more])
    experiments.main()
    return (Path(flags[-1]) / "tables.md").read_text()


def test_exits_tuned_together_are_those_tuned_alone(flags, monkeypatch):
    tables = run(monkeypatch, flags, "--only", "independence", "--no-speeds")
    (row,) = [line for line in tables.splitlines() if line.startswith("| 2 ")]
    assert row.endswith("| yes | 0 |")
    assert "| `layer` exit, 4 steps |" in tables


def test_what_is_there_is_not_run_again(flags, monkeypatch):
    run(monkeypatch, flags, "--only", "independence", "--no-speeds")
    monkeypatch.setattr(tuned, "tune", lambda config: pytest.fail("it was there"))
    assert "## independence" in run(monkeypatch, flags, "--only", "independence", "--no-speeds")
    saved = json.loads((Path(flags[-1]) / "results.json").read_text())
    assert len(saved["runs"]) == 2
    monkeypatch.setattr(experiments, "made", lambda args: pytest.fail("tables need no model"))
    before = run(monkeypatch, flags, "--tables")
    assert "| `layer` exit, 4 steps |" in before
    shutil.rmtree(Path(flags[-1]) / "runs")
    assert run(monkeypatch, flags, "--tables") == before


def test_a_folder_is_for_runs_with_the_same_settings(flags, monkeypatch):
    run(monkeypatch, flags, "--only", "independence", "--no-speeds")
    others = [*flags[:-2], "--lr", "0.5", *flags[-2:]]
    with pytest.raises(SystemExit, match=r"results\.json has runs of .*'lr': 0\.001"):
        run(monkeypatch, others, "--only", "independence", "--no-speeds")


def test_no_run_begins_when_time_is_up(flags, monkeypatch, tmp_path):
    late = [*flags[:-1], str(tmp_path / "late")]
    monkeypatch.setattr(tuned, "tune", lambda config: pytest.fail("it is too late"))
    assert "## " not in run(monkeypatch, late, "--only", "losses", "--minutes", "0")


def test_each_amount_of_each_kind_is_seen_on_each_kind(flags, monkeypatch, data):
    own = ["--own", data, "--own-valid", data, "--amounts", "64", "192"]
    tables = run(monkeypatch, flags, "--only", "data", "--no-speeds", *own)
    rows = [
        line.split(" | ") for line in tables.splitlines() if line.startswith(("| own", "| doc"))
    ]
    assert [row[:2] for row in rows] == [
        [f"| {kind}", tokens] for kind in ("own text", "documents") for tokens in ("64", "192")
    ]
    assert all(len(row) == 6 for row in rows)
    assert run(monkeypatch, flags, "--only", "data", "--tables") == tables


@pytest.mark.slow
def test_losses_and_depths(flags, monkeypatch):
    monkeypatch.setattr(experiments, "ARCHS", ("norm",))
    monkeypatch.setattr(experiments, "LOSSES", {"kl": {"loss": "kl"}})
    tables = run(monkeypatch, flags, "--only", "depths", "losses", "--layers", "1,2")
    assert tables.count("| `norm` |") == 2
    assert tables.count("×") == 2  # speeds
    assert "| 2 | kl |" in tables
    assert (Path(flags[-1]) / "depths.svg").exists()
