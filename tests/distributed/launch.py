"""Runs `tune` as several processes would: ``launch.py CASES.json`` forks the ranks once.

A case is {"size", "port", "settings", "error"}: the first `size` ranks call `tune` with
`settings`; what goes wrong on a rank is written to the file `error` + its number. A case
may `count` its traffic: see `traffic`; its ranks may each work in one of its `folders`, and have
so many `logits` at a time.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets
import torch
import torch.distributed as dist
from rich.console import Console

from ee_tuning.config import TuneConfig
from ee_tuning.tune import loop as tuning
from ee_tuning.tune import step


def traffic(path: str) -> None:
    """Count what goes out of this process: bytes sent to stages, reduced; write them to `path`."""
    found: dict[str, list] = {"sent": [], "reduced": [], "received": []}
    send, receive, reduce = dist.isend, dist.recv, dist.all_reduce

    def isend(tensor, dst, **rest):
        found["sent"].append((tensor.nbytes, dst))
        Path(path).write_text(json.dumps(found))
        return send(tensor, dst=dst, **rest)

    def recv(tensor, src, **rest):
        found["received"].append((tensor.nbytes, src))
        Path(path).write_text(json.dumps(found))
        return receive(tensor, src=src, **rest)

    def all_reduce(tensor, *args, group=None, **rest):
        found["reduced"].append((tensor.nbytes, dist.get_world_size(group), rest != {}))
        Path(path).write_text(json.dumps(found))
        return reduce(tensor, *args, group=group, **rest)

    dist.isend, dist.recv, dist.all_reduce = isend, recv, all_reduce


def run(rank: int, cases: list[dict]) -> None:
    """Every case that this rank has a part in."""
    torch.set_num_threads(1)
    originals = dist.isend, dist.recv, dist.all_reduce
    for case in cases:
        if rank >= case["size"]:
            continue
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(case["size"]), LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(case["port"]),
        )  # fmt: skip
        dist.isend, dist.recv, dist.all_reduce = originals
        if "count" in case:
            traffic(f"{case['count']}{rank}")
        settings = dict(case["settings"])
        settings |= case.get("only_rank", {}).get(str(rank), {})
        step.LOGITS = case["logits"]
        if case["folders"]:
            os.chdir(case["folders"][rank])
        try:
            tuning.tune(TuneConfig(**settings), Console(quiet=True))
        except Exception as error:
            import traceback

            text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            Path(f"{case['error']}{rank}").write_text(text)
            if dist.is_initialized():
                dist.destroy_process_group()


def main() -> None:
    """Fork the ranks, wait for them."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2])
    ranks = []
    for rank in range(max(case["size"] for case in cases)):
        ranks.append(os.fork())
        if not ranks[-1]:
            run(rank, cases)
            sys.stdout.flush()
            os._exit(0)
    for rank in ranks:
        os.waitpid(rank, 0)


if __name__ == "__main__":
    main()
