"""The whole way on a small real model: tune exits, measure them, generate with them.

python demo/demo.py             # what `make demo` runs
python demo/demo.py --readme    # also put the measured tables into README.md
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

from ee_tuning.cli import main

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"
PROMPT = "def read_lines(path):"
COMMANDS = [
    "tune --config demo/run.yaml --overwrite",
    "evaluate --config demo/evaluate.yaml",
    "generate --exits demo/exits --threshold 0.5 --max-new-tokens 80 --prompt",
]


def run() -> float:
    """Run the three commands from the project's root; gives the seconds of all."""
    start = time.perf_counter()
    for command in COMMANDS:
        words = shlex.split(command) + ([PROMPT] if command.endswith("--prompt") else [])
        print(f"\n$ ee-tuning {shlex.join(words)}", flush=True)
        main(words)
    return time.perf_counter() - start


def tables(result: dict[str, Any], losses: list[dict[str, float]], seconds: float) -> str:
    """The README's tables, from evaluation.json and metrics.jsonl."""
    lines = [
        "| exit layer | loss before | loss after | agrees with the final exit |",
        "|---|---|---|---|",
    ]
    for row in result["exit_rows"]:
        if not row["final"]:
            layer = str(row["layer"])
            before, after = losses[0][layer], losses[-1][layer]
            lines.append(f"| {layer} | {before:.2f} | {after:.2f} | {row['agreement']:.0%} |")
        else:
            lines.append(f"| {row['layer']}, final | – | {row['loss']:.2f} | – |")
    lines += [
        "",
        "| threshold | mean depth | next token agrees | generated text agrees | tokens/s (min–max) | against full depth | lossless, against full depth |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["threshold_rows"]:
        lines.append(
            f"| {row['threshold']:g} | {row['mean_depth']:.1f} | {row['next_token_agreement']:.0%} "
            f"| {row['text_agreement']:.0%} | {_speed(row)} | {row['speedup']:.2f}× | {_lossless(row, result['prompts'])} |"
        )
    theirs = result["transformers"]
    lines += [
        f"| transformers' `generate` | {result['depth']} | – | – | {_speed(theirs)} | {theirs['speedup']:.2f}× | – |",
        "",
        f"{result['machine']}; fp32, batch 1, greedy, {result['prompts']} prompts of "
        f"{result['settings']['prompt_length']} tokens, {result['tokens_per_prompt']} new tokens each, "
        f"median of {result['settings']['rounds']} rounds (least and most in brackets); losses in nats per token "
        f"on held-out files, before and after on the first part of them. `make demo` took {seconds:.0f} s here.",
    ]  # fmt: skip
    return "\n".join(lines)


def _lossless(row: dict[str, Any], prompts: int) -> str:
    found = row["speculative"]
    if not found:
        return "–"
    return f"{found['speedup']:.2f}× ({found['identical_texts']} of {prompts} texts identical)"


def _speed(row: dict[str, Any]) -> str:
    speed = row["speed"]
    return f"{speed['median']:.0f} ({speed['min']:.0f}–{speed['max']:.0f})"


def update_readme(seconds: float) -> None:
    """Replace what stands between the two marks in README.md."""
    exits = ROOT / "demo" / "exits"
    result = json.loads((exits / "evaluation.json").read_text())
    records = map(json.loads, (exits / "metrics.jsonl").read_text().splitlines())
    losses = [record["valid_loss"] for record in records if "valid_loss" in record]
    replace_in_readme(BEGIN, END, tables(result, losses, seconds))


def replace_in_readme(begin: str, end: str, body: str) -> None:
    """Replace what stands between two marks in README.md."""
    readme = ROOT / "README.md"
    head, _, rest = readme.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    readme.write_text(f"{head}{begin}\n{body}\n{end}{tail}")


def readme_wanted(doc: str) -> bool:
    """Whether the command line says `--readme`; doc: of the script, whose first line is its help."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="put the table into README.md, too")
    return bool(parser.parse_args().readme)


if __name__ == "__main__":
    readme = readme_wanted(__doc__)
    seconds = run()
    print(f"\nThat took {seconds:.0f} s. The report with plots: demo/exits/report.html")
    if readme:
        update_readme(seconds)
