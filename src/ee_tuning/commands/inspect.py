"""`ee-tuning inspect`: what a backbone or a folder of exits is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ee_tuning.adapter import (
    CONFIG_NAME,
    HERE,
    count_parameters,
    find_exits,
    read_calibration,
    read_exit_config,
    stored_hashes,
)
from ee_tuning.certificate import Certificate, changed
from ee_tuning.config import InspectConfig
from ee_tuning.errors import UserError
from ee_tuning.exit_config import exit_name, threshold_text
from ee_tuning.fingerprint import EXIT, PART, config_values
from ee_tuning.hub import check_there, find_file
from ee_tuning.loading import load_config


def inspect(config: InspectConfig) -> None:
    """Print what is at ``config.path``, a folder or a hub id of a backbone or of exits.

    Raises:
        UserError: nothing is there, or something else.
    """
    path = config.path
    check_there(path, "backbone or exits", "config.json")
    local = Path(path).is_dir()
    is_exits = find_file(str(find_exits(path)) if local else path, CONFIG_NAME) is not None
    console = Console()
    if is_exits:
        folder = find_exits(path)
        saved = read_exit_config(folder)
        table, line = _exits_table(path, folder, saved), _calibration(folder, saved)
        console.print(table)
        console.print(line, highlight=False, soft_wrap=True)
    else:
        console.print(_backbone_table(path, config.trust_remote_code))


def _backbone_table(path: str, trust: bool) -> Table:
    table = Table(title=f"backbone {path}", show_header=False)
    for key, value in config_values(load_config(path, trust)).items():
        if value is not None:
            table.add_row(key, str(value))
    return table


def _exits_table(path: str, folder: Path, saved: dict[str, Any]) -> Table:
    depth = saved["backbone"]["config"]["num_hidden_layers"]
    notes = []
    if saved.get("sources"):
        notes.append(f"the draft reads layers {', '.join(map(str, saved['sources']))}")
    base = "the backbone beside them" if saved["base_model"] == HERE else saved["base_model"]
    table = Table(title=f"exits {path}\nfor {base} ({depth} layers)")
    for column in ("exit layer", "architecture", "head", "parameters"):
        table.add_column(column, justify="right")
    if saved.get("vocab_size"):
        total = saved["backbone"]["config"]["vocab_size"]
        known = f"the exits know {saved['vocab_size']:,} of {total:,} tokens"
        share = saved.get("vocab_coverage")
        notes.append(known if share is None else f"{known}, {share:.2%} of held-out targets")
    table.caption = "\n".join(notes) or None
    sizes = count_parameters(folder)
    for layer, arch, head in zip(*(saved[k] for k in ("layers", "arch", "head")), strict=True):
        table.add_row(exit_name(layer), arch, head, f"{sizes.get(layer, 0):,}")
    return table


def _calibration(folder: Path, saved: dict[str, Any]) -> str:
    """A line: what was proven of the exits in a folder, and whether it is of these."""
    found = read_calibration(folder)
    if found is None:
        return "not calibrated"
    return (
        f"calibrated: threshold {threshold_text(found.thresholds)}, in {found.dtype}; "
        f"{found.risk} risk at most {found.epsilon:g} with probability {1 - found.delta:g}, "
        f"tested on {found.n:,} prompts; {_holds(folder, saved, found)}"
    )


def _holds(folder: Path, saved: dict[str, Any], found: Certificate) -> str:
    """Whether a certificate is of the exits in a folder, and of the backbone that they are for, as
    far as files beside them tell."""
    dtype, parts = getattr(torch, found.dtype, None), saved["backbone"]["tensors"]
    if not isinstance(dtype, torch.dtype):
        raise UserError(
            f"the certificate in {folder} is of {found.dtype}, which is no dtype: delete it, and "
            "calibrate again"
        )
    if gone := {*found.exits} - {*saved["layers"]}:
        return f"void: there is no exit at layer {min(gone)} any more, calibrate again"
    hashes = stored_hashes(folder, saved, found.exits, dtype)
    others = changed(EXIT, hashes, found.exits, None) + changed(PART, parts, found.backbone, None)
    if others:
        return f"void: the {others[0]} is another one now, calibrate again"
    if {*found.exits} - {*hashes}:
        return (
            "of the backbone that these exits are for; exits with rows of its head are compared "
            "when they are loaded"
        )
    return "of these exits and the backbone that they are for"
