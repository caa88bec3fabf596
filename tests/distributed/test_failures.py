"""Ranks that die or hang under torchrun: what the others do, and how the run goes on."""

import json
import os
import re
import shutil
import signal
import time

import kills
import pytest
from helpers.commands import PATIENCE
from helpers.forks import fork, torchrun
from helpers.struck import run as struck_run
from safetensors.torch import load_file

from ee_tuning.cli import main
from ee_tuning.tune.loop import stop_requests


@pytest.fixture
def start(base, data, tmp_path):
    """Starts a run of two ranks, the second of which a signal strikes in its third checkpoint."""
    flags = {
        "model": base, "layers": "1,3", "arch": "mlp", "data": data, "out": tmp_path / "cut",
        "steps": 30, "seq-length": 32, "micro-batch-size": 2, "global-batch-size": 4, "lr": 1e-3,
        "save-every": 1, "log-every": 1, "valid-fraction": 0.1, "eval-every": 0,
    }  # fmt: skip
    common = [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    def start(number, restarts, *layout):
        command = ["tune", *common, *layout]
        struck = (struck_run, int(number), tmp_path / "struck", *command)
        return fork(tmp_path / "log", torchrun, 2, restarts, *struck)

    start.common = common
    return start


def wait_for(condition):
    deadline = time.time() + PATIENCE
    while not condition():
        assert time.time() < deadline
        time.sleep(0.005)


def said(tmp_path):
    lines = (tmp_path / "log").read_text().splitlines()
    return [line for line in lines if line.startswith("ee-tuning: ")]


def test_a_killed_rank_is_restarted_from_the_last_checkpoint(start, tmp_path):
    process = start(signal.SIGKILL, 1, "--dp", "2", "--timeout", "60")
    assert process.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    lines = said(tmp_path)
    assert len(lines) == 1, log
    assert re.match(r"ee-tuning: rank 0 \(pp 0, dp 0, tp 0\) failed at step \d+: ", lines[0])
    shown = [line for line in log.splitlines() if "tok/s" in line]
    assert sum(line.startswith("step 1 ") for line in shown) == 1  # it did not begin anew
    main(["tune", *start.common[:9], str(tmp_path / "whole"), *start.common[10:]])
    whole, cut = (load_file(tmp_path / name / "exits.safetensors") for name in ("whole", "cut"))
    for name, value in whole.items():
        assert (value - cut[name]).abs().max() < 30 * 2e-5, name
    records = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in records if "grad_norm" in line]
    assert steps == list(range(1, 31))


def test_an_overwriting_run_that_is_restarted_goes_on_with_its_own(start, tmp_path, monkeypatch):
    """Not with the checkpoints of the earlier run, which give way to its first one.

    Struck in that, it begins anew; struck in the third one after that, it goes on from the second.
    """
    monkeypatch.setenv("STRUCK_AT", "1,3")
    out = tmp_path / "cut"
    main(["tune", *start.common, "--steps", "2"])
    process = start(signal.SIGKILL, 2, "--overwrite", "--steps=6", "--dp=2", "--timeout=60")
    assert process.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    shown = [int(line.split()[1]) for line in log.splitlines() if "tok/s" in line]
    assert [step for step in shown if step < 3] == [1, 1, 2]
    assert shown[-4:] == [3, 4, 5, 6]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "checkpoints", "exit_config.json", "exits.safetensors", "metrics.jsonl",
        "run.yaml",
    ]  # fmt: skip
    records = (out / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in records if "grad_norm" in line]
    assert steps == list(range(1, 7))


@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_does_not_silence_a_rank_that_failed(processes):
    """It sends SIGTERM as soon as another one is dead, perhaps before what failed is said."""
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    try:
        with pytest.raises(RuntimeError), stop_requests(processes):
            raise RuntimeError
        os.kill(os.getpid(), signal.SIGTERM)
        assert bool(ended) == (processes == 1)
        if processes > 1:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ranks_give_up_on_a_hanging_one_in_time(start, tmp_path):
    process = start(signal.SIGSTOP, 0, "--pp", "2", "--timeout", "10")
    struck = tmp_path / "struck"
    wait_for(struck.exists)
    wait_for(lambda: said(tmp_path))
    assert time.time() - struck.stat().st_mtime > 9
    os.kill(int(struck.read_text()), signal.SIGKILL)
    assert process.wait(PATIENCE) == 1
    (line,) = said(tmp_path)
    assert re.match(r"ee-tuning: rank 0 \(pp 0, dp 0, tp 0\) failed at step \d+: .*[Tt]im", line)
    main(["tune", *start.common, "--resume", "--pp", "1"])
    assert (tmp_path / "cut/exits.safetensors").exists()


def test_a_missing_shard_is_one_line_and_status_2(backbones, data, tmp_path, free_port):
    """Rank 1's disk lacks a file, rank 0 need not wait for it."""
    processes = []
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        shutil.copytree(backbones / "llama", folder / "model")
        env = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
        flags = ["--model", "model", "--data", data, "--layers", "1,5", "--out", tmp_path / "out"]
        flags += ["--seq-length", "64"]
        command = ["tune", *map(str, flags), "--pp", "2"]
        processes.append((command, folder, {k: str(v) for k, v in env.items()}))
    min((tmp_path / "1/model").glob("*.safetensors")).unlink()
    started = [
        fork(folder / "said", main, command, cwd=folder, env=env)
        for command, folder, env in processes
    ]
    for rank, process in enumerate(started):
        assert process.wait(PATIENCE) == 2, process.said
        said = process.said
        (line,) = [text for text in said.splitlines() if text.startswith("ee-tuning: ")]
        assert line.startswith(f"ee-tuning: rank {rank}: cannot load the backbone model: ")
        assert "Traceback" not in said


def test_a_rank_is_killed_at_random(monkeypatch, capsys):
    """As benchmarks/kills.py does it more often, and of tuning; what it judges, it says."""

    def start(folder, more, restarted):
        (folder / "log").unlink(missing_ok=True)
        return fork(folder / "log", torchrun, 2, int(restarted), kills.rank, more)

    monkeypatch.setattr(kills, "start", start)
    flags = ["--kills", "2", "--phase", "loading to decode", "decoding"]
    monkeypatch.setattr("sys.argv", ["kills.py", *flags])
    assert kills.main() == 0, capsys.readouterr().out
