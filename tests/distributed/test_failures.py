"""Ranks that die or hang under torchrun: what the others do, and how the run goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ee_tuning.cli import main


@pytest.fixture
def start(base, data, tmp_path):
    """Starts a run of two ranks; gives torchrun's process, once three steps are done."""
    flags = {
        "model": base, "layers": "1,3", "arch": "mlp", "data": data, "out": tmp_path / "cut",
        "steps": 30, "seq-length": 32, "micro-batch-size": 2, "global-batch-size": 4, "lr": 1e-3,
        "save-every": 1, "log-every": 1, "valid-fraction": 0.1, "eval-every": 0,
    }  # fmt: skip
    common = [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    def start(restarts, *layout):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts",
            str(restarts), "-m", "ee_tuning", "tune", *common, *layout,
        ]  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env=env, stderr=log, stdout=log)
        metrics = tmp_path / "cut/metrics.jsonl"
        wait_for(lambda: metrics.exists() and '"step": 3' in metrics.read_text())
        return process

    start.common = common
    return start


def wait_for(condition, seconds=90):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.005)


def rank_of(process, rank):
    """The process id of a rank that torchrun started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == process.pid and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"rank {rank} does not run")


def said(tmp_path):
    lines = (tmp_path / "log").read_text().splitlines()
    return [line for line in lines if line.startswith("ee-tuning: ")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_is_restarted_from_the_last_checkpoint(start, tmp_path):
    process = start(1, "--dp", "2", "--timeout", "60")
    os.kill(rank_of(process, 1), signal.SIGKILL)
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    lines = said(tmp_path)
    assert len(lines) == 1
    assert re.match(r"ee-tuning: rank 0 \(pp 0, dp 0, tp 0\) failed at step \d+: ", lines[0])
    shown = [line for line in (tmp_path / "log").read_text().splitlines() if "tok/s" in line]
    assert sum(line.startswith("step 1 ") for line in shown) == 1  # it did not begin anew
    main(["tune", *start.common[:9], str(tmp_path / "whole"), *start.common[10:]])
    whole, cut = (load_file(tmp_path / name / "exits.safetensors") for name in ("whole", "cut"))
    for name, value in whole.items():
        assert (value - cut[name]).abs().max() < 30 * 2e-5, name
    records = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in records if "grad_norm" in line]
    assert steps == list(range(1, 31))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_give_up_on_a_hanging_one_in_time(start, tmp_path):
    process = start(0, "--pp", "2", "--timeout", "4")
    hanging = rank_of(process, 1)
    os.kill(hanging, signal.SIGSTOP)
    began = time.time()
    wait_for(lambda: said(tmp_path), 15)
    assert time.time() - began > 3
    os.kill(hanging, signal.SIGKILL)
    assert process.wait(60) == 1
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
        command = [sys.executable, "-m", "ee_tuning", "tune", *flags, "--pp", "2"]
        processes.append((command, folder, os.environ | {k: str(v) for k, v in env.items()}))
    min((tmp_path / "1/model").glob("*.safetensors")).unlink()
    started = [
        subprocess.Popen(command, cwd=folder, env=env, text=True, stderr=subprocess.PIPE)
        for command, folder, env in processes
    ]
    for rank, process in enumerate(started):
        said = process.communicate(timeout=90)[1]
        assert process.returncode == 2, said
        (line,) = [text for text in said.splitlines() if text.startswith("ee-tuning: ")]
        assert line.startswith(f"ee-tuning: rank {rank}: cannot load the backbone model: ")
        assert "Traceback" not in said
