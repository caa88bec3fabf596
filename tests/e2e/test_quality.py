"""`benchmarks/quality.py`: what was measured is kept as it comes, and shown as far as it goes."""

import json
import subprocess
import sys

import pytest
import quality

from ee_tuning.files import write_json

ROW = {"against_full": 1.25, "mean_depth": 21.0, "identical_texts": "3 of 4"}


@pytest.fixture
def flags(tmp_path):
    return ["--exits", "exits", "--thresholds", "0.75", "--out", str(tmp_path / "out")]


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["quality.py", *flags])
    quality.main()


def test_scores_that_are_there_are_not_lost_to_one_that_fails(monkeypatch, flags, tmp_path):
    asked = []

    def score(way, names, args):
        asked.append((way.name, *names))
        if way.name == "threshold 0.75" and "choices" in names:
            raise RuntimeError("out of memory")
        return {name: {"score": 0.5, "error": 0.1} for name in names}

    monkeypatch.setattr(quality, "score", score)
    only = ["--parts", "scores", "--only", "full", "threshold"]
    with pytest.raises(RuntimeError, match="out of memory"):
        run(monkeypatch, *flags, *only)
    found = json.loads((tmp_path / "out/scores.json").read_text())
    assert found["full depth"].keys() == {"HumanEval", "puzzles", "choices"}
    assert found["threshold 0.75"].keys() == {"HumanEval"}
    assert len(asked) == 4
    asked.clear()
    monkeypatch.setattr(quality, "score", lambda way, names, args: asked.append(names) or {})
    run(monkeypatch, *flags, *only)
    assert asked == [["puzzles", "choices"]]


def test_scores_for_which_there_was_no_time_are_left_out(monkeypatch, flags, tmp_path, capsys):
    def late(*_, timeout, **__):
        raise subprocess.TimeoutExpired("lm-eval", timeout)

    monkeypatch.setattr(quality.subprocess, "run", late)
    run(monkeypatch, *flags, "--parts", "scores", "--only", "full", "--minutes", "0")
    printed = capsys.readouterr().out
    assert printed.count("full depth: no time was left for scores") == 2
    assert "| full depth | – | – | – |" in printed


def test_tables_of_what_is_there(monkeypatch, flags, tmp_path, capsys):
    out = tmp_path / "out"
    machines = {"scores": {"machine": "a CPU"}, "speeds": {"machine": "a GPU; versions"}}
    write_json(out / "quality.json", machines)
    score = {"puzzles": {"score": 0.25, "error": 0.01}}
    write_json(out / "scores.json", {"threshold 0.75": score})
    write_json(out / "speeds.json", {"threshold 0.75": {"code": ROW, "chat": ROW}})
    run(monkeypatch, *flags, "--parts")
    text = (out / "quality.md").read_text()
    assert "| way | HumanEval | puzzles | choices | speed | code / chat |" in text
    row = "| threshold 0.75 | – | 25.0% ± 1.0% | – | 1.25× | 1.25 / 1.25 | 21.0 | 6 of 8 |"
    assert row in text
    assert text.rstrip().endswith("scores: a CPU; speeds: a GPU; versions")
    assert (out / "quality.svg").exists()
    assert text.strip() in capsys.readouterr().out
