"""Put the tables of benchmarks/results into docs/efficiency.md.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOC = Path(__file__).parent.parent / "docs" / "efficiency.md"
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
PLAIN = {
    "head": "own", "backbone_precision": "same", "exit_precision": "same", "exit_vocab": "0",
    "optimizer": "adamw", "master_weights": "fp32",
}  # fmt: skip


def steps() -> str:
    """Speed, memory and parts of every measured tuning step."""
    lines = [
        "| shape | exits | flags | tokens/s (min–max) | peak GiB | of the bf16 ceiling | "
        "backbone | exits | heads | optimizer |",
        "|---" * 10 + "|",
    ]
    machines = set()
    for path in sorted(RESULTS.glob("*.json")):
        result: dict[str, Any] = json.loads(path.read_text())
        if "tokens_per_second" not in result:
            continue
        given, rate = result["settings"], result["tokens_per_second"]
        flags = [
            f"`--{k.replace('_', '-')} {given[k]}`"
            for k, v in PLAIN.items()
            if given.get(k, v) != v
        ]
        flop, top = result["flop_per_token"]["sum"], result["matmul_tflops"]
        share = flop * rate["median"] / top / 1e12
        parts = result["seconds_per_step"].values()
        backbone, exits, optimizer, heads = (f"{v:.2f} s" for v in parts)
        lines.append(
            f"| {given['shape']} | {given['layers'].count(',') + 1} | {' '.join(flags) or '–'} | "
            f"{rate['median']:,} ({rate['min']:,}–{rate['max']:,}) | {result['peak_gib']} | "
            f"{share:.0%} of {top} TFLOP/s | {backbone} | {exits} | {heads} | {optimizer} |"
        )
        machines.add(f"{result['hardware']}; {result['versions']}")
        if "baseline" in result:
            plain = result["baseline"]
            lines.append(
                f"| {given['shape']} | {given['layers'].count(',') + 1} | plain PyTorch "
                f"| {plain['tokens_per_second']['median']:,} | {plain['peak_gib']} |" + " – |" * 5
            )
    return "\n".join([*lines, "", *sorted(machines)])


def losses(runs: dict[str, Any]) -> str:
    """Final losses per exit, and how far each is from the first run's."""
    plain = next(iter(runs.values()))["after"]
    lines = [
        "| tuned with | " + " | ".join(f"exit {layer}" for layer in plain) + " |",
        "|---" * (len(plain) + 1) + "|",
    ]
    for name, run in runs.items():
        cells = [f"{v:.4f} ({v / plain[k] - 1:+.2%})" for k, v in run["after"].items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def savings() -> str:
    """Final losses of the same exits tuned with each saving."""
    result = json.loads((RESULTS / "savings.json").read_text())
    runs = result["runs"]
    base, given = result["backbone"], next(iter(runs.values()))["settings"]
    return "\n".join(
        [
            losses(runs),
            "",
            f"{result['hardware']}; {result['versions']}. Backbone: {base['parameters']:,} "
            f"parameters, {base['layers']} layers, pre-trained for {base['train_seconds']:.0f} s "
            f"({base['tokens']:,} tokens), its own held-out loss {base['nats_per_token']:.2f}. "
            f"{given['steps']} steps of {given['global_batch_size']} × {given['seq_length']} "
            f"tokens, `{given['arch']}` exits with own heads, one run each; nats per token.",
        ]
    )


def updated(text: str) -> str:
    """`text` with both tables between their marks."""
    for name, table in (("steps", steps()), ("savings", savings())):
        begin, end = BEGIN.format(name), END.format(name)
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    DOC.write_text(updated(DOC.read_text()))
