"""The layouts of a large run on paper.

python benchmarks/scaling.py [TRACE.json MICRO_BATCHES]

Without arguments: Llama-2-70B, 8 `mlp` exits, on 8, 64 and 512 GPUs, the best layouts by search.
With the ``trace.json`` of a pipeline of pp stages (dp = tp = 1): the simulator against it.
docs/scaling.md states the assumptions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from shapes import SHAPES
from transformers import AutoModelForCausalLM, LlamaConfig

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.config import TuneConfig
from ee_tuning.parallel.trace import idle_share, span
from ee_tuning.plan.gpus import GPUS
from ee_tuning.plan.layouts import rows, search
from ee_tuning.plan.simulate import simulate
from ee_tuning.plan.time import Seconds

# One exit after 20 of the layers, measured in steps of 4 micro-batches.
MEASURED = json.loads((Path(__file__).parent / "results/70b-quarter.json").read_text())
SECONDS = MEASURED["seconds_per_step"]
PARTS = Seconds(
    SECONDS["backbone"] / 20 / 4,
    (SECONDS["exits below their heads"] + SECONDS["heads and losses (the rest)"]) / 4,
    SECONDS["clip and optimizer (and a fill of the gradients)"],
)
RUNS = ((8, 64), (64, 64), (512, 512))  # GPUs, micro-batches of a step


def shapes() -> EarlyExitModel:
    """Llama-2-70B with an `mlp` exit every 10 layers, without weights."""
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES["llama2-70b"]))
        return EarlyExitModel(backbone, ExitConfig("every:10", "mlp"))


def table(best: int) -> str:
    """The `best` layouts of each of `RUNS`, as Markdown."""
    model = shapes()
    lines = ["| GPUs | micro-batches a step | dp × tp × pp | tokens/s | idle | memory |"]
    lines.append("|---" * 6 + "|")
    for gpus, batch in RUNS:
        config = TuneConfig(seq_length=2048, micro_batch_size=4, global_batch_size=4 * batch)
        found = search(model, config, PARTS, gpus, GPUS["h200"].memory)
        for cells in rows(found[:best]):
            lines.append(f"| {' | '.join([str(gpus), str(batch), *cells])} |")
    return "\n".join(lines)


def compare(path: str, number: int) -> None:
    """A measured timeline of `number` micro-batches against the simulator, fed with its times."""
    stages = list(json.loads(Path(path).read_text()).values())
    runs = [[event for event in own if event[0] == "forward"] for own in stages]
    works = [[event for event in own if event[0] == "exit work"] for own in stages]
    parts = [[sum(b - a for _, a, b in own) / number for own in part] for part in (runs, works)]
    # Whether the first exit work of a stage comes after the last of its forward passes.
    together = [work[0][1] >= run[-1][2] for run, work in zip(runs, works, strict=True)]
    first, last = span(stages)
    alone = simulate(*parts, number, steps=1, together=together)
    print(f"{number} micro-batches, seconds of each: forward {parts[0]}, exits {parts[1]}")
    print(f"the step: {last - first:.4f} s, simulated {alone.seconds:.4f} s")
    print(f"idle: {idle_share(stages):.1%}, simulated {alone.idle:.1%}")


def main() -> None:
    """The table, or the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", nargs="?", help="trace.json of a pipeline, with dp and tp 1")
    parser.add_argument("micro_batches", nargs="?", type=int, help="of a step of it")
    args = parser.parse_args()
    if (args.trace is None) != (args.micro_batches is None):
        parser.error("a trace and its number of micro-batches go together")
    if args.trace is None:
        print(table(best=4))
    else:
        compare(args.trace, args.micro_batches)


if __name__ == "__main__":
    main()
