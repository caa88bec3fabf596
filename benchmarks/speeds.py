"""What decoding brings on the real model, of `real.py`'s results: the README's table and picture.

python benchmarks/speeds.py    # draws the picture; the table is put there by benchmarks/table.py
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from experiments import save
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
SETS = ("code", "chat", "documents")
COLOURS = "#0072b2", "#e69f00", "#009e73"  # told apart by colour-blind eyes, too


@dataclass(frozen=True)
class Line:
    """One way to decode, of a file of `real.py`.

    way: what the name of its rows ends with. text: whose the texts are. drawn: it has a place in
    the picture, which is of one text at a time.
    """

    name: str
    file: str
    way: str
    text: str = "full depth's"
    drawn: bool = True


DRAFT = "draft exit, bar 0.1, up to 6"
ALONE, BOTH = "lookup, up to 6", "lookup, bar 0.1, up to 6"
LINES = [
    Line("draft exit and `--lookup`", "real-h200-drafts", BOTH),
    Line("draft exit", "real-h200-drafts", f"exits: {DRAFT}"),
    Line("`--lookup` alone", "real-h200-drafts", ALONE),
    Line("draft exit and `--lookup`, a busy host", "real-h200-busy", BOTH, drawn=False),
    Line("draft exit, a busy host", "real-h200-busy", f"exits: {DRAFT}", drawn=False),
    Line("`--lookup` alone, a busy host", "real-h200-busy", ALONE, drawn=False),
    Line("draft exit, temperature 0.8", "real-sampled-h200", DRAFT, "full depth's of a seed"),
    Line("`threshold`, exits after layers 10 and 20", "real-layers-h200", "20:0.8335"),
    Line("draft exit, eight texts at once", "real-batch8-h200", DRAFT, drawn=False),
    Line("transformers, compiled", "real-h200", "static cache, compiled", "–"),
    Line("transformers' prompt lookup", "real-h200", "transformers, prompt lookup", "–"),
    Line("transformers' early exit", "real-assistant-h200", "exit 10", "–", drawn=False),
    Line("economize, no drafts", "real-h200", "economize, plain", "–"),
    Line("economize's `jump`, up to 3 drafts", "real-h200", "jump, up to 3", "–"),
    Line("economize's `eagle3`, up to 5", "real-h200", "eagle3, up to 5, above 0.5", "–"),
]


@cache
def result(line: Line) -> dict[str, Any]:
    """The file of a line."""
    found: dict[str, Any] = json.loads((RESULTS / f"{line.file}.json").read_text())
    return found


def rows(line: Line) -> dict[str, Any]:
    """Those of a line, by set of prompts."""
    return {row["set"]: row for row in result(line)["rows"] if row["way"].endswith(line.way)}


def full(line: Line) -> str:
    """Tokens per second at full depth, in the run of a line."""
    own = {row["set"]: row for row in result(line)["rows"] if row["way"] == "full depth"}
    return ", ".join(f"{own[name]['tokens_per_second']:,.0f}" for name in SETS)


def texts(line: Line, own: dict[str, Any]) -> str:
    """Whose they are, and how many were found to be."""
    differs = [row["next_token_differs"] for row in own.values() if "next_token_differs" in row]
    if differs:
        return f"{np.mean(differs):.1%} of next tokens differ"
    if line.text != Line.text:
        return line.text
    counts = [row["identical_texts"].split(" of ") for row in own.values()]
    same, of_all = (sum(map(int, column)) for column in zip(*counts, strict=True))
    return f"{line.text}: {same} of {of_all}"


def prompts(own: dict[str, Any]) -> int:
    """How many a set had."""
    (number,) = {row["calls"] * row["batch"] for row in own.values()}
    return int(number)


def table() -> str:
    """Speeds as multiples of full depth's, on the same prompts in the same run."""
    lines = [
        f"| way | {' | '.join(SETS)} | slowest request | texts | prompts a set | "
        "full depth, tokens/s | GPU |",
        "|---" * 9 + "|",
    ]
    for line in LINES:
        own = rows(line)
        speeds = " | ".join(f"{own[name]['against_full']:.2f}×" for name in SETS)
        slowest = min(row["slowest_request"] for row in own.values())
        gpu = result(line)["hardware"].split()[1]
        file = f"[{gpu}](benchmarks/results/{line.file}.json)"
        lines.append(
            f"| {line.name} | {speeds} | {slowest:.2f}× | {texts(line, own)} | {prompts(own)} | "
            f"{full(line)} | {file} |"
        )
    about = {f"{result(line)['versions']}; {result(line)['dtype']}" for line in LINES}
    rounds = {result(line)["settings"]["rounds"] for line in LINES}
    note = ["SmolLM2-135M-Instruct", *sorted(about)]
    note += [f"the better of {' or '.join(sorted(rounds))} runs of a prompt"]
    note += ["ratios are to full depth in the same run."]
    return "\n".join([*lines, "", "; ".join(note)])


def picture() -> None:
    """Bars of the same figures, of one text at a time."""
    drawn = [line for line in LINES if line.drawn][::-1]
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens per second, as a multiple of full depth's")
    height = 0.26
    for place, (name, colour) in enumerate(zip(SETS, COLOURS, strict=True)):
        speeds = [rows(line)[name]["against_full"] for line in drawn]
        bars = axes.barh(
            np.arange(len(drawn)) + (1 - place) * height, speeds, height, color=colour, label=name
        )
        axes.bar_label(bars, fmt="%.2f×", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(drawn)), [line.name.replace("`", "") for line in drawn])
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    save(figure, RESULTS / "real.svg")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    picture()
