"""Microseconds of a small sum over GPUs: by way of their memory, and through NCCL.

torchrun --nproc-per-node 2 benchmarks/sums.py --out sums.json

64 sums after each other in a captured graph, as in a token of decoding with --tp: of bf16 numbers,
and of four parts in fp32 of each, as products leave them. Both ways have to give the same bits.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.collectives import Group
from ee_tuning.devices import hardware, pick_device, versions
from ee_tuning.files import write_json
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.peers import inbox

SUMS, ROUNDS = 64, 10


def microseconds(job: Callable[[], Tensor], mesh: Mesh) -> tuple[float, torch.cuda.CUDAGraph]:
    """Of one of them; the graph is kept until the group's sums are over."""
    job()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(SUMS):
            job()
    graph.replay()
    torch.cuda.synchronize()
    mesh.barrier()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(ROUNDS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return round(1000 * start.elapsed_time(end) / (SUMS * ROUNDS), 2), graph


def measure(group: Group, mesh: Mesh, device: torch.device, number: int) -> dict[str, float]:
    """Microseconds of a sum of so many numbers, by way of it."""
    draw = torch.Generator().manual_seed(mesh.rank)
    x = torch.randn(number, generator=draw).to(device, torch.bfloat16)
    parts = torch.randn(4, number, generator=draw).to(device)
    own, found, graphs = inbox._inboxes, {}, []
    sums = {}
    for name, boxes in (("memory", own), ("NCCL", {})):
        inbox._inboxes = boxes
        sums[name] = [group.reduce(x), group.total(parts)]
        jobs = {name: lambda: group.reduce(x)}
        if boxes:
            jobs[f"{name}, four parts"] = lambda: group.total(parts)
        for way, job in jobs.items():
            found[way], graph = microseconds(job, mesh)
            graphs.append(graph)
    inbox._inboxes = own
    if not all(map(torch.equal, sums["memory"], sums["NCCL"])):
        raise SystemExit(f"sums of {number} numbers are not the same bits")
    for graph in graphs:  # NCCL keeps a group until those that captured its sums are gone
        graph.reset()
    return found


def main() -> None:
    """The main process prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numbers", type=int, nargs="+", default=[4096, 5 * 4096, 64 * 4096])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mesh, device = Mesh(tp=int(os.environ.get("WORLD_SIZE", 1))), pick_device("auto")
    if device.type != "cuda" or mesh.tp == 1:
        raise SystemExit("this measures GPUs: start it with torchrun on two of them or more")
    with mesh.connected(device, timeout=60):
        group = Group.of(mesh.axis("tp"))
        group.share_memory(device)
        if not group.holds(max(args.numbers)):
            raise SystemExit("these GPUs do not reach each other's memory, or there is no room")
        found = {number: measure(group, mesh, device, number) for number in args.numbers}
    if mesh.is_main:
        print(*found.items(), sep="\n")
        if args.out:
            machine = {"hardware": hardware(device), "versions": versions(), "ranks": mesh.tp}
            write_json(args.out, machine | {"microseconds": found})


if __name__ == "__main__":
    main()
