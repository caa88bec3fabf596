"""`ee-tuning evaluate`: what the exits cost in quality and bring in speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ee_tuning.adapter import find_exits
from ee_tuning.config import EvaluateConfig
from ee_tuning.data import Rows, describe, load_packed
from ee_tuning.decode.load import load_for_decoding
from ee_tuning.decode.settings import check_threshold
from ee_tuning.devices import hardware, pick_device, versions
from ee_tuning.errors import UserError, all_checked
from ee_tuning.evaluate.exits import Track, active_exits, measure_exits, unknown_text
from ee_tuning.evaluate.report import write_report
from ee_tuning.evaluate.speed import measure_thresholds, take_prompts
from ee_tuning.exit_config import DRAFT, exit_name
from ee_tuning.files import write_json
from ee_tuning.folders import claim, refuse_foreign
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.plan.check import check_length
from ee_tuning.settings import warn_of_fewer

RESULTS = "evaluation.json", "report.html"
COUNTS = (
    "micro_batch_size", "max_tokens", "prompts", "prompt_length", "rounds", "max_new_tokens",
)  # fmt: skip


def evaluate(config: EvaluateConfig, console: Console | None = None) -> dict[str, Any]:
    """Measure the exits, print two tables, write ``evaluation.json`` and ``report.html``.

    Of several processes the first one prints and writes.

    Raises:
        UserError: no data, no exits, no folder to write to, or a setting that makes no sense.
        ProcessFailed: one of several processes failed.
    """
    check_settings(config)
    thresholds = parse_thresholds(config.thresholds)
    find_exits(config.exits)
    mesh, device = Mesh(dp=config.dp, tp=config.tp), pick_device(config.device)
    with mesh.connected(device, config.timeout, advice="Start it again"):
        mesh.check_same("settings", repr(config))
        folder = mesh.on_main(lambda: results_folder(config))
        model, tokenizer = load_for_decoding(config, mesh)
        packed, prompts = _read(config, model, tokenizer, mesh)
        all_checked()
        result = _measure(config, model, packed, prompts, thresholds, mesh)
    if mesh.is_main:
        _show(result, console or Console(), folder, tokenizer)
    return result


def _read(
    config: EvaluateConfig, model: Network, tokenizer: PreTrainedTokenizerBase, mesh: Mesh
) -> tuple[Rows, list[list[int]]]:
    """The data and the prompts of it.

    Raises:
        UserError: exits or data that cannot be measured.
    """
    if model.exit_layers == [DRAFT]:
        raise UserError(
            "evaluate measures exits at which tokens leave, and there is a draft exit alone: how "
            "its drafts agree with the final exit is in the run's metrics.jsonl, draft_agreement"
        )
    active_exits(model, config)  # refuses others
    check_length(config.seq_length, model.backbone.context)
    packed = mesh.on_all(
        lambda: load_packed(config.data, tokenizer, config.seq_length, config.seed, config)
    )
    prompts = take_prompts(packed, config.prompts, config.prompt_length)
    mesh.check_same("data", repr(prompts))
    if mesh.is_main:
        warn_of_fewer("prompts", config.prompts, len(prompts))
    if len(prompts) < mesh.dp:
        raise UserError(f"dp is {mesh.dp}, and there are {len(prompts)} prompts: give each one")
    return packed, prompts


def _measure(
    config: EvaluateConfig,
    model: Network,
    packed: Rows,
    prompts: list[list[int]],
    thresholds: list[float],
    mesh: Mesh,
) -> dict[str, Any]:
    """What ``evaluation.json`` holds, on every process of a connected `mesh`."""
    progress = Console(stderr=True, quiet=not mesh.is_main)
    progress.print(describe(packed), highlight=False, soft_wrap=True)
    with _tracked(progress, "losses and agreement on the data") as track:
        measured = measure_exits(model, packed, config, thresholds, mesh, track)
    with _tracked(progress, "speed and agreement of generated text") as track:
        measured |= measure_thresholds(model, prompts, thresholds, config, mesh, track)
    for row, next_token in zip(measured["threshold_rows"], measured.pop("next_token"), strict=True):
        row["next_token_agreement"] = next_token["agreement"]
        row["next_token_interval"] = next_token["interval"]
        row["next_token_depth"] = next_token["mean_depth"]
    return {
        "base_model": model.backbone.model.name_or_path,
        "exits": model.exit_layers,
        "depth": model.backbone.num_layers,
        "machine": describe_machine(model.backbone.device),
        "dtype": str(model.backbone.model.dtype).removeprefix("torch."),
        "settings": dataclasses.asdict(config),
        **measured,
    }


@contextmanager
def _tracked(console: Console, what: str) -> Iterator[Track]:
    """What shows how far something is, and the time left, as long as it takes."""
    columns = TextColumn(what), BarColumn(bar_width=24), TaskProgressColumn()
    shown = console.is_terminal and not console.quiet
    bar = Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown
    )
    with bar:
        yield bar.track


def _show(
    result: dict[str, Any], console: Console, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print the tables, write the files."""
    for table in tables(result):  # first: whatever becomes of the files, it took minutes
        console.print(table)
    write_json(folder / "evaluation.json", result)
    write_report(folder / "report.html", result, tokenizer)
    console.print(f"written: {folder / 'evaluation.json'} and {folder / 'report.html'}")


def check_settings(config: EvaluateConfig) -> None:
    """Refuse, before anything is loaded, what would fail after the long part.

    Raises:
        UserError: no data, a number that has to be at least 1, or a prompt longer than a row.
    """
    if not config.data:
        raise UserError("no data given: name held-out files, folders or hub ids with --data")
    for name in COUNTS:
        if getattr(config, name) < 1:
            raise UserError(f"{name} {getattr(config, name)} is too small: give at least 1")
    if config.prompt_length > config.seq_length:
        raise UserError(
            f"prompt_length {config.prompt_length} is more than seq_length {config.seq_length}: "
            "prompts are taken from packed sequences, lower --prompt-length"
        )


def results_folder(config: EvaluateConfig) -> Path:
    """Where the two files go, made if need be: `out`, or the exits' folder.

    Raises:
        UserError: the folder cannot be written, holds others of these names, or the exits are
            from the hub and have none.
    """
    if not config.out and not Path(config.exits).is_dir():
        raise UserError("exits from the hub have no folder for the results: name one with --out")
    folder = claim(config.out or config.exits, overwrite=False, resume=True).folder
    refuse_foreign(folder, RESULTS)
    return folder


def parse_thresholds(given: str | float | list[float]) -> list[float]:
    """Thresholds from ``"1,0.8,0.4"``, a number or a list of them, highest first.

    Raises:
        UserError: one is not a number within [0, 1].
    """
    try:
        items = given if isinstance(given, list) else str(given).split(",")
        values = sorted({float(item) for item in items}, reverse=True)
    except ValueError:
        raise UserError(f"thresholds {given!r} are not numbers with commas between them") from None
    for value in values:
        check_threshold(value)
    return values


def describe_machine(device: torch.device) -> str:
    """Hardware and versions, for every figure that is published."""
    return f"{hardware(device)}; {versions()}"


def tables(result: dict[str, Any]) -> list[Table]:
    """The exits' and the thresholds' figures for the terminal."""
    exits = Table(title="exits, on held-out data", caption=unknown_text(result))
    for column in ("layer", "loss", "agrees with final exit", "mean confidence"):
        exits.add_column(column, justify="right")
    for row in result["exit_rows"]:
        name = f"{row['layer']} (final)" if row["final"] else exit_name(row["layer"])
        exits.add_row(
            name, f"{row['loss']:.3f}", f"{row['agreement']:.1%}", f"{row['confidence']:.3f}"
        )
    speeds = Table(
        title="thresholds: mean depth, agreement with full depth (next token, text), speed",
        caption=f"greedy, batch 1, {result['tokens_per_prompt']} new tokens; median (least–most); "
        "drafting: speed-up of mode speculative",
    )
    for column in ("threshold", "depth", "next", "text", "tok/s", "speed-up", "drafting"):
        speeds.add_column(column, justify="right", no_wrap=True)
    for row in result["threshold_rows"]:
        speeds.add_row(
            f"{row['threshold']:g}",
            f"{row['mean_depth']:.1f}",
            f"{row['next_token_agreement']:.1%}",
            f"{row['text_agreement']:.1%}",
            speed_text(row["speed"]),
            f"{row['speedup']:.2f}×",
            f"{row['speculative']['speedup']:.2f}×" if row["speculative"] else "",
        )
    for name in ("lookup", "transformers"):
        found = result[name]
        speeds.add_row(name, "", "", "", speed_text(found["speed"]), f"{found['speedup']:.2f}×")
    return [exits, speeds]


def speed_text(speed: dict[str, float]) -> str:
    """``35 (34–36)``: median, least and most tokens per second over the rounds."""
    return f"{speed['median']:.0f} ({speed['min']:.0f}–{speed['max']:.0f})"
