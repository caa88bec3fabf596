"""The HTML report: one page, plots as SVG inside it, nothing fetched from anywhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from ee_tuning.decode.text import TextStream, depth_colour
from ee_tuning.evaluate.exits import unknown_text
from ee_tuning.exit_config import DRAFT
from ee_tuning.files import write_text

INK = "#1b2733"  # lines and words of a plot: in the page, the colour of its text
COLOURS = "#3b82c4", "#d9772f", "#3a9d6a"  # seen on white and on black
STYLE: Any = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "grid.color": INK, "grid.alpha": 0.2, "font.size": 9,
    "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    "svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "ee-tuning",
}  # fmt: skip
Interval = list[float]


def write_report(path: Path, result: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Render an evaluation's result to the file at `path`."""
    environment = Environment(loader=PackageLoader("ee_tuning.evaluate", "."), autoescape=True)
    environment.filters |= {"share": share_text, "times": times_text}
    plots = (loss_plot, depth_plot, speed_plot, share_plot)
    with rc_context(STYLE):
        drawn = {plot.__name__: _svg(plot(result)) for plot in plots}
    page = environment.get_template("report.html.j2").render(
        unknown=unknown_text(result),
        result=result,
        **drawn,
        samples=[_sample(text, result["depth"], tokenizer) for text in result["samples"]["texts"]],
        legend=[(layer, depth_colour(layer, result["depth"])) for layer in _places(result)],
    )
    write_text(path, page)


def share_text(value: float, interval: Interval | None = None) -> str:
    """``97.2 % (96.1–98.0)``."""
    between = f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})" if interval else ""
    return f"{100 * value:.1f} %{between}"


def times_text(value: float, interval: Interval | None = None) -> str:
    """``1.21× (1.18–1.25)``."""
    between = f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else ""
    return f"{value:.2f}×{between}"


def loss_plot(result: dict[str, Any]) -> Figure:
    """Loss over depth, from exit to exit to the end."""
    return _over_depth(result, "held-out loss (nats per token)", "loss", 1)


def depth_plot(result: dict[str, Any]) -> Figure:
    """Agreement with the final exit over depth."""
    return _over_depth(result, "agrees with full depth (%)", "agreement", 100)


def _over_depth(result: dict[str, Any], name: str, key: str, scale: float) -> Figure:
    figure, axes = _axes("layer", name)
    rows = [row for row in result["exit_rows"] if row["layer"] != DRAFT]
    exits, final = [row for row in rows if not row["final"]], rows[-1]
    places, values = [row["layer"] for row in rows], [scale * row[key] for row in rows]
    axes.plot(places, values, "-", color=COLOURS[0], alpha=0.5, linewidth=1)
    for own, mark, label in ((exits, "o", "exits"), ([final], "s", "full depth")):
        _points(
            axes, [(row["layer"], row[key]) for row in own], mark, label,
            COLOURS[0] if own is exits else INK,
            heights=[row[f"{key}_interval"] for row in own], scale=scale,
        )  # fmt: skip
    axes.set_xlim(0, result["depth"] + 1)
    axes.legend()
    return figure


def speed_plot(result: dict[str, Any]) -> Figure:
    """Quality against measured speed, a point per threshold, with what lossless drafting gives."""
    figure, axes = _axes("speed, full depth = 1", "agrees with full depth (%)")
    rows = result["threshold_rows"]
    across = [row["speedup_interval"] for row in rows]
    for key, label, mark, colour in (
        ("next_token", "next token", "o", COLOURS[0]),
        ("text", "generated text", "s", COLOURS[1]),
    ):
        points = [(row["speedup"], row[f"{key}_agreement"]) for row in rows]
        heights = [row[f"{key}_interval"] for row in rows]
        _points(axes, points, mark, label, colour, across, heights, 100)
        path = [(x, 100 * y) for x, y in points]
        axes.plot(*zip(*path, strict=True), "-", color=colour, alpha=0.4, linewidth=1)
    for row in rows:
        place = row["speedup"], 100 * row["next_token_agreement"]
        axes.annotate(f"{row['threshold']:g}", place, textcoords="offset points", xytext=(5, 5))
    drafted = [row["speculative"] for row in rows if row["speculative"]]
    if drafted:
        points = [(one["speedup"], one["identical_texts"] / result["prompts"]) for one in drafted]
        widths = [one["speedup_interval"] for one in drafted]
        _points(axes, points, "^", "drafts, verified", COLOURS[2], widths, None, 100)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # off the points
    return figure


def _points(
    axes: Any,
    points: list[tuple[float, float]],
    mark: str,
    label: str,
    colour: str,
    widths: list[Interval] | None = None,
    heights: list[Interval] | None = None,
    scale: float = 1,
) -> None:
    """Points with their intervals; scale: of what is upwards."""
    xs, ys = zip(*points, strict=True)
    axes.errorbar(
        xs, [scale * y for y in ys], fmt=mark, label=label, color=colour, markersize=5,
        xerr=_arms(xs, widths, 1), yerr=_arms(ys, heights, scale), elinewidth=1, alpha=0.9,
    )  # fmt: skip


def _arms(values: Sequence[float], intervals: list[Interval] | None, scale: float) -> Any:
    """How far intervals go below and above values."""
    if intervals is None:
        return None
    pairs = [one or [value, value] for value, one in zip(values, intervals, strict=True)]
    below = [scale * max(0, value - low) for value, (low, _) in zip(values, pairs, strict=True)]
    above = [scale * max(0, high - value) for value, (_, high) in zip(values, pairs, strict=True)]
    return [below, above]


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
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _places(result: dict[str, Any]) -> list[int]:
    return sorted({*result["exits"], result["depth"]} - {DRAFT})


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5, 3.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y")
    return figure, axes


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    drawn = buffer.getvalue()
    return Markup(drawn[drawn.index("<svg") :].replace(INK, "currentColor"))


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
