"""The HTML report: one page, plots as SVG inside it, nothing fetched from anywhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from ee_tuning.decode.text import TextStream, depth_colour
from ee_tuning.evaluate.exits import unknown_text
from ee_tuning.exit_config import DRAFT
from ee_tuning.files import write_text


def write_report(path: Path, result: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Render an evaluation's result to the file at `path`."""
    environment = Environment(loader=PackageLoader("ee_tuning.evaluate", "."), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        unknown=unknown_text(result),
        result=result,
        loss_plot=_svg(loss_plot(result)),
        agreement_plot=_svg(agreement_plot(result)),
        share_plot=_svg(share_plot(result)),
        samples=[_sample(text, result["depth"], tokenizer) for text in result["samples"]["texts"]],
        legend=[(layer, depth_colour(layer, result["depth"])) for layer in _places(result)],
    )
    write_text(path, page)


def loss_plot(result: dict[str, Any]) -> Figure:
    """Loss of each exit and of the final exit over their depth."""
    figure, axes = _axes("exit layer", "held-out loss (nats per token)")
    exits = [row for row in result["exit_rows"] if not row["final"] and row["layer"] != DRAFT]
    final = next(row for row in result["exit_rows"] if row["final"])
    axes.plot([r["layer"] for r in exits], [r["loss"] for r in exits], "o-", label="exits")
    axes.plot([final["layer"]], [final["loss"]], "s", color="black", label="final exit")
    axes.set_xlim(0, result["depth"] + 1)
    axes.legend(frameon=False)
    return figure


def agreement_plot(result: dict[str, Any]) -> Figure:
    """Agreement against measured speed-up, a point per threshold."""
    figure, axes = _axes("speed, full depth = 1", "agreement with full depth (%)")
    for key, label, mark in (
        ("next_token_agreement", "next token, given the data's text", "o-"),
        ("text_agreement", "generated text, token by token", "s--"),
    ):
        points = [(row["speedup"], 100 * row[key]) for row in result["threshold_rows"]]
        axes.plot(*zip(*points, strict=True), mark, label=label)
        for row, place in zip(result["threshold_rows"], points, strict=True):
            axes.annotate(f"{row['threshold']:g}", place, textcoords="offset points", xytext=(5, 5))
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # off the points
    return figure


def share_plot(result: dict[str, Any]) -> Figure:
    """Stacked bars: the share of tokens that left at each layer, per threshold."""
    figure, axes = _axes("threshold", "tokens (%)")
    names = [f"{row['threshold']:g}" for row in result["threshold_rows"]]
    bottom = [0.0] * len(names)
    for layer in _places(result):
        shares = [100 * row["shares"][layer] for row in result["threshold_rows"]]
        colour = depth_colour(layer, result["depth"])
        axes.bar(names, shares, bottom=bottom, color=colour, label=f"layer {layer}", width=0.7)
        bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _places(result: dict[str, Any]) -> list[int]:
    return sorted({*result["exits"], result["depth"]} - {DRAFT})


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return Markup(buffer.getvalue()[buffer.getvalue().index("<svg") :])


def _sample(text: dict[str, Any], depth: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A sample's prompt, its tokens with colours, and the full-depth text."""
    prompt, ids = text["prompt"], text["tokens"]
    pieces = _pieces(prompt, ids, tokenizer)
    rows = zip(pieces, text["layers"], text["confidences"], strict=True)
    tokens = [(piece, layer, sure, depth_colour(layer, depth)) for piece, layer, sure in rows]
    return {
        "prompt": tokenizer.decode(prompt),
        "tokens": tokens,
        "full": "".join(_pieces(prompt, text["full"], tokenizer)),
    }


def _pieces(prompt: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text each of `ids` adds to the prompt and the tokens before it.

    Decoded together, since a token alone may lose its leading space. A character of several
    tokens comes with its last one.
    """
    text = TextStream(tokenizer, skip_special_tokens=False)
    text.put(prompt)
    pieces = [text.put([token]) for token in ids]
    return [*pieces[:-1], pieces[-1] + text.end()] if pieces else []
