"""`ee-tuning inspect`: what a backbone or a folder of exits is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ee_tuning.adapter import (
    CONFIG_NAME,
    HERE,
    count_parameters,
    find_exits,
    read_exit_config,
)
from ee_tuning.config import InspectConfig
from ee_tuning.exit_config import exit_name
from ee_tuning.fingerprint import config_values
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
    table = _exits_table(path) if is_exits else _backbone_table(path, config.trust_remote_code)
    Console().print(table)


def _backbone_table(path: str, trust: bool) -> Table:
    table = Table(title=f"backbone {path}", show_header=False)
    for key, value in config_values(load_config(path, trust)).items():
        if value is not None:
            table.add_row(key, str(value))
    return table


def _exits_table(path: str) -> Table:
    folder = find_exits(path)
    saved = read_exit_config(folder)
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
