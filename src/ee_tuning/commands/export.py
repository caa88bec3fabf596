"""`ee-tuning export`: an exit as an ordinary checkpoint, or backbone and exits as one folder."""

from __future__ import annotations

from pathlib import Path

from ee_tuning.adapter import base_of, find_exits, read_exit_config, stored
from ee_tuning.config import ExportConfig
from ee_tuning.errors import UserError
from ee_tuning.exit_config import DRAFT, exit_name
from ee_tuning.export import DRAFT_EXIT, exit_checkpoint, save_eagle3, save_exit, save_merged
from ee_tuning.folders import claim
from ee_tuning.loading import load_tokenizer
from ee_tuning.model import Network
from ee_tuning.own_code import is_own_code
from ee_tuning.share import Saved, Share, load


def export(config: ExportConfig) -> None:
    """Write what `config` asks for to ``config.out``.

    Raises:
        UserError: not one of `layer`, `eagle3` and `merge`, an exit that is not there or cannot
            be a checkpoint of its own, or a folder that is taken.
    """
    layer = _number(config.layer)
    if (layer is not None) + bool(config.eagle3) + config.merge != 1:
        raise UserError(
            "give one of --layer, for an exit as a checkpoint of its own, --eagle3, for a draft "
            "exit in EAGLE-3's layout, and --merge, for backbone and exits in one folder"
        )
    found = find_exits(config.exits)
    base = base_of(found, read_exit_config(found), config.model or None)
    if config.out and Path(config.out).resolve() in {Path(p).resolve() for p in (found, base)}:
        raise UserError(f"{config.out} is what is being exported: give another folder with --out")
    output = claim(config.out, config.overwrite)
    source = Saved(config.exits, config.model or None, config.trust_remote_code)
    model = load(source, Share(whole=not layer), Network)
    if is_own_code(model.config):
        raise UserError(
            f"{type(model.model).__name__} is code that came with {base}, which an export would "
            "lack: use the exits as they are"
        )
    tokenizer = load_tokenizer(base, trust=config.trust_remote_code)
    exported = exit_checkpoint(model, layer) if layer else None
    with output.filled() as folder:
        if exported is not None:
            what = f"exit {layer} as a checkpoint"
            save_exit(exported, tokenizer, folder, f"Exit {layer} of {base}")
        elif config.eagle3:
            what = "the draft exit in EAGLE-3's layout"
            save_eagle3(model, tokenizer, folder, base, config.eagle3)
        else:
            what = "backbone and exits"
            save_merged(model, tokenizer, folder, stored(found))
    print(f"{what} saved in {config.out}")


def _number(layer: int | str | None) -> int | None:
    """The layer that was given as one, if any was.

    Raises:
        UserError: it is no number, or a draft exit's.
    """
    if layer in (DRAFT, exit_name(DRAFT)):
        raise UserError(f"layer is {layer!r}: {DRAFT_EXIT}")
    if layer is None or isinstance(layer, int):
        return layer
    raise UserError(f"layer is {layer!r}: give the number of one exit's layer, as inspect lists it")
