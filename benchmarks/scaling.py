"""The layouts of a large run on paper: ``python benchmarks/scaling.py [TRACE.json MICRO_BATCHES]``.

Without arguments: Llama-2-70B, 8 `mlp` exits, on 8, 64 and 512 GPUs, the best layouts by search.
With the ``trace.json`` of a pipeline of pp stages (dp = tp = 1): the simulator against it.
docs/scaling.md states the assumptions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ee_tuning.parallel.pipeline import balance
from ee_tuning.parallel.simulate import simulate

MEASURED = json.loads((Path(__file__).parent / "results/70b-quarter.json").read_text())
PARTS = MEASURED["seconds_per_step"]
TOKENS, MICRO = 2048 * 4, 4  # of a micro-batch; micro-batches of the measured step
LAYER = PARTS["backbone"] / 20 / MICRO
EXIT = (PARTS["exits below their heads"] + PARTS["heads and losses (the rest)"]) / MICRO
STEP = PARTS["clip and optimizer (and a fill of the gradients)"]
HIDDEN, LAYERS, EVERY = 8192, 80, 10
LAYER_WEIGHTS = 2 * HIDDEN**2 + 2 * HIDDEN * 1024 + 3 * HIDDEN * 28672
EXIT_WEIGHTS = 32000 * HIDDEN + 3 * HIDDEN * 28672
INSIDE, OUTSIDE = 300e9, 40e9  # bytes per second of a GPU within a node and between nodes: assumed
MEMORY = 141e9 * 0.9


def layout(gpus: int, tp: int, pp: int, batch: int) -> dict[str, float] | None:
    """Throughput of a layout; None if it does not fit. batch: micro-batches of all ranks."""
    dp = gpus // (tp * pp)
    if dp * tp * pp != gpus or batch % dp:
        return None
    state = TOKENS * HIDDEN * 2  # bytes of a hidden state
    reduce = 2 * (tp - 1) / tp * state / INSIDE
    layer, exit = LAYER / tp + 2 * reduce, EXIT / tp + 4 * reduce
    numbers = balance([layer + exit * ((k + 1) % EVERY == 0) for k in range(LAYERS)], pp)
    stops = [sum(numbers[: s + 1]) for s in range(pp)]
    exits = [stop // EVERY - (stop - n) // EVERY for n, stop in zip(numbers, stops, strict=True)]
    most = max(zip(exits, numbers, strict=True), key=lambda s: s[0] * 12 * EXIT_WEIGHTS + s[1])
    memory = (most[0] * 12 + 6) * EXIT_WEIGHTS / tp + most[1] * 2 * LAYER_WEIGHTS / tp
    if memory > MEMORY:
        return None
    each = batch // dp
    work = [n * exit + n * STEP / tp / each for n in exits]
    found = simulate([n * layer for n in numbers], work, each, state / OUTSIDE if pp > 1 else 0)
    gradients = 4 * EXIT_WEIGHTS / tp * 2 * (dp - 1) / dp / (INSIDE if gpus <= 8 else OUTSIDE)
    seconds = found.seconds + gradients  # of the last exit; those before are hidden
    return {
        "dp": dp, "tp": tp, "pp": pp, "tokens/s": batch * TOKENS / seconds,
        "idle": 1 - (1 - found.idle) * found.seconds / seconds, "GB per rank": memory / 1e9,
    }  # fmt: skip


def search(gpus: int, batch: int) -> list[dict[str, float]]:
    """The layouts that fit, the fastest first."""
    sizes = [(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8, 16, 32)]
    found = [layout(gpus, tp, pp, batch) for tp, pp in sizes]
    return sorted((f for f in found if f), key=lambda f: -f["tokens/s"])


def compare(path: str, number: int) -> None:
    """A measured timeline of `number` micro-batches against the simulator, fed with its times."""
    rows = list(json.loads(Path(path).read_text()).values())
    runs = [[stop - start for what, start, stop in row if what == "forward"] for row in rows]
    works = [[stop - start for what, start, stop in row if what == "exit work"] for row in rows]
    forward, exits = ([sum(times) / number for times in part] for part in (runs, works))
    first = min(start for row in rows for _, start, _ in row)
    span = max(stop for row in rows for _, _, stop in row) - first
    alone = simulate(forward, exits, number, steps=1)
    print(f"{number} micro-batches, forward {forward}, exits {exits}")
    print(f"one step from its first event to its last: {span:.4f} s, simulated {alone.seconds:.4f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compare(sys.argv[1], int(sys.argv[2]))
        raise SystemExit
    for gpus, batch in ((8, 64), (64, 64), (512, 512)):
        for found in search(gpus, batch)[:3]:
            print(gpus, " ".join(f"{name} {value:.3g}" for name, value in found.items()))
