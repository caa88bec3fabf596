"""The output folder: never overwritten by accident, never emptied of what is not ours."""

from __future__ import annotations

import shutil
from pathlib import Path

from ee_tuning.errors import UserError

OURS = (
    "exits.safetensors", "exit_config.json", "README.md", "run.yaml", "metrics.jsonl",
    "checkpoints", "tensorboard", "evaluation.json", "report.html", "trace.json", "trace.png",
)  # fmt: skip


def claim_folder(out: str, overwrite: bool, resume: bool | None = None) -> Path:
    """The folder at `out`, created if need be.

    overwrite: remove what an earlier run left there; other files stay. resume: take it as it is;
        None: what fills it cannot go on.

    Raises:
        UserError: no folder given, one that cannot be written, or one that is not empty while
            neither `overwrite` nor `resume` is given.
    """
    if not out:
        raise UserError("no output folder given: name one with --out")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (overwrite or resume):
            go_on = "" if resume is None else "go on with --resume, "
            raise UserError(
                f"the folder {out} is not empty: {go_on}replace it with --overwrite or choose "
                "another --out"
            )
        if overwrite and not resume:
            for name in OURS:
                _remove(folder / name)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    return folder


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
