"""`ee-tuning export`: an exit as an ordinary checkpoint, or backbone and exits as one folder."""

from __future__ import annotations

from pathlib import Path

from ee_tuning.adapter import base_of, find_exits, read_exit_config, stored
from ee_tuning.config import ExportConfig
from ee_tuning.errors import UserError
from ee_tuning.export import exit_checkpoint, save_exit, save_merged
from ee_tuning.folders import claim
from ee_tuning.loading import load_tokenizer
from ee_tuning.model import Network
from ee_tuning.own_code import is_own_code
from ee_tuning.share import Saved, Share, load


def export(config: ExportConfig) -> None:
    """Write what `config` asks for to ``config.out``.

    Raises:
        UserError: both or neither of `layer` and `merge`, an exit that is not there or cannot be
            a checkpoint of its own, or a folder that is taken.
    """
    if bool(config.layer) == config.merge:
        raise UserError(
            "give either --layer, for one exit as a checkpoint of its own, or --merge, for "
            "backbone and exits in one folder"
        )
    found = find_exits(config.exits)
    base = base_of(found, read_exit_config(found), config.model or None)
    if config.out and Path(config.out).resolve() in {Path(p).resolve() for p in (found, base)}:
        raise UserError(f"{config.out} is what is being exported: give another folder with --out")
    output = claim(config.out, config.overwrite)
    source = Saved(config.exits, config.model or None, config.trust_remote_code)
    model = load(source, Share(whole=config.merge), Network)
    if is_own_code(model.config):
        raise UserError(
            f"{type(model.model).__name__} is code that came with {base}, which an export would "
            "lack: use the exits as they are"
        )
    tokenizer = load_tokenizer(base, trust=config.trust_remote_code)
    exported = None if config.merge else exit_checkpoint(model, config.layer)
    with output.filled() as folder:
        if exported is None:
            save_merged(model, tokenizer, folder, stored(found))
        else:
            save_exit(exported, tokenizer, folder, f"Exit {config.layer} of {base}")
    what = "backbone and exits" if config.merge else f"exit {config.layer} as a checkpoint"
    print(f"{what} saved in {config.out}")
