"""The folder that a command fills: never by accident, and never in place of what is not ours.

What an earlier command left there stays until something new is whole: the new files are written to
``.unfinished`` inside the folder, then the old ones move to ``.replaced`` and the new ones into
their place, each by a rename, and at the very end ``.replaced`` goes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ee_tuning.errors import UserError
from ee_tuning.files import check_writable, read_json, write_json, writing

UNFINISHED, REPLACED, MANIFEST = ".unfinished", ".replaced", ".ee-tuning.json"
KEPT = "wandb"  # the log of a run may be known elsewhere, too: it stays where it is
HASHED_BLOCKS, BLOCK = 64, 4096


@dataclass
class Output:
    """The folder that ``--out`` names.

    replaces: what is in it still has to give way. overwrites: ``--overwrite`` was given, also
        where nothing was there.
    """

    folder: Path
    replaces: bool = False
    overwrites: bool = False

    @property
    def path(self) -> Path:
        """Where to write now."""
        return self.folder / UNFINISHED if self.replaces else self.folder

    def begin(self) -> None:
        """Make an empty place to write to, of which an earlier command may have left one."""
        with writing(self.folder):
            if self.replaces:
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir()
            elif self.overwrites:  # nothing was in the way: it has been taken
                (self.folder / REPLACED).mkdir(exist_ok=True)

    def take_place(self) -> None:
        """Let what was written so far take the place of what was there, which is kept aside.

        Raises:
            UserError: something that is not ours has come to be in the way.
        """
        new = self.path
        refuse_foreign(self.folder, [path.name for path in new.iterdir()])
        aside = self.folder / REPLACED
        with writing(self.folder):
            # Of what is aside already, something was whole; what is here now was cut off.
            aside = aside / "later" if aside.exists() else aside
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            stays = {name.split("/")[0] for name in foreign(self.folder)}
            stays |= {UNFINISHED, REPLACED, KEPT}
            for path in self.folder.iterdir():
                if path.name not in stays:
                    os.rename(path, aside / path.name)
            for path in new.iterdir():
                os.rename(path, self.folder / path.name)
            new.rmdir()
        self.replaces = False

    def finish(self) -> None:
        """All that is new is there: drop what was kept aside."""
        shutil.rmtree(self.folder / REPLACED, ignore_errors=True)

    @contextmanager
    def left_alone_by_failure(self, keep: bool = False) -> Iterator[None]:
        """What fails inside leaves the folder as it was until something new took its place.

        keep: what was written stays beside it.
        """
        try:
            yield
        except BaseException:
            if self.replaces and not keep:
                shutil.rmtree(self.path, ignore_errors=True)
            elif self.overwrites and not keep:
                with suppress(OSError):  # unless something is aside in it
                    (self.folder / REPLACED).rmdir()
            raise

    @contextmanager
    def filled(self) -> Iterator[Path]:
        """A place for all that a command writes, which takes its own at the end."""
        with self.left_alone_by_failure():
            self.begin()
            yield self.path
            if self.replaces:
                self.take_place()
            self.finish()


def claim(
    out: str, overwrite: bool, resume: bool | None = None, reads: Iterable[str] = ()
) -> Output:
    """The folder at `out`, made if need be; nothing in it is touched.

    overwrite: what an earlier command left there is to be replaced. resume: go on with it; None:
        what fills the folder cannot go on. reads: folders that the command starts from.

    Raises:
        UserError: no folder given, one that cannot be written to, one that is not empty while
            neither `overwrite` nor `resume` is given, or `overwrite` where something is in it
            that this project did not write, or that the command needs.
    """
    if not out:
        raise UserError("no output folder given: name one with --out")
    folder = Path(out)
    check_writable(folder)
    try:
        full = any(folder.iterdir())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {folder}: {reason}; choose another --out") from error
    if full and not (overwrite or resume):
        go_on = "" if resume is None else "go on with --resume, "
        raise UserError(
            f"the folder {out} is not empty: {go_on}replace it with --overwrite or choose "
            "another --out"
        )
    overwrites = overwrite and not resume
    if overwrites:
        if folder.resolve() in {Path(path).resolve() for path in reads if path}:
            raise UserError(f"{out} is what this starts from: give another folder with --out")
        refuse_foreign(folder)
    there = any(path.name != REPLACED for path in folder.iterdir())
    return Output(folder, overwrites and there, overwrites)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Inside, no other process that asks for this writes to `folder`.

    The kernel lets go of it when this process ends, however it does. Where there is no such lock,
    as on some network file systems, nobody is kept out.

    Raises:
        UserError: another one is inside.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run writes to {folder}: wait for its end, or choose another --out"
            ) from None
        except OSError:  # no such lock
            pass
        yield
    finally:
        os.close(held)


def refuse_foreign(folder: Path, names: Iterable[str] | None = None) -> None:
    """Refuse to replace what this project did not write.

    names: what would be replaced; default: everything in `folder`.

    Raises:
        UserError: names it.
    """
    found = foreign(folder)
    if names is not None:
        found = [name for name in found if name.split("/")[0] in names]
    if found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
        raise UserError(
            f"{folder} holds what ee-tuning did not write, or what was changed since: {shown}; "
            "move it elsewhere or choose another --out"
        )


def foreign(folder: Path) -> list[str]:
    """Paths within `folder` of what this project did not write, as far as their content tells."""
    known = _manifest(folder)
    found = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if name in (UNFINISHED, REPLACED, KEPT) or _is_left_over(path):
            continue
        if path.is_file() and name in known and known[name] == fingerprint(path):
            continue
        if name in _FOLDERS and path.is_dir():
            inner = [_within(path, part) for part in path.rglob("*") if not part.is_dir()]
            found += sorted(part for part in inner if not re.fullmatch(_FOLDERS[name], part))
        elif not (name in _FILES and path.is_file() and _says(_FILES[name], path)):
            found.append(name)
    return found


def write_manifest(folder: Path) -> None:
    """List the files of `folder`, so that they are known again if they are not changed."""
    files = {path.name: fingerprint(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / MANIFEST, {"files": files})


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    return {**_read(path).get("files", {}), MANIFEST: fingerprint(path)} if path.is_file() else {}


def fingerprint(path: Path) -> str:
    """A hash of a file's size and of blocks spread evenly over it, or of all of a small one."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    starts = range(0, size, max(BLOCK, size // HASHED_BLOCKS))
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _within(folder: Path, path: Path) -> str:
    return path.relative_to(folder.parent).as_posix()


def _is_left_over(path: Path) -> bool:
    """Whether a process that was killed left `path` as it wrote one of this project's files."""
    name = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", path.name)
    return name is not None and name[1] in (*_FILES, *_FOLDERS)


def _says(is_ours: Callable[[Path], bool], path: Path) -> bool:
    try:
        return is_ours(path)
    except (OSError, ValueError, SafetensorError):
        return False


def _read(path: Path) -> dict[str, Any]:
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def _begins(*marks: str) -> Callable[[Path], bool]:
    """Whether one of `marks` is near the beginning of a text."""

    def says(path: Path) -> bool:
        with path.open(encoding="utf-8", errors="replace") as file:
            start = file.read(4096)
        return any(mark in start for mark in marks)

    return says


def is_json_with(path: Path, *keys: str) -> bool:
    """Whether a file is a JSON object that has all of `keys`."""
    return _says(_holds(*keys), path)


def _holds(*keys: str) -> Callable[[Path], bool]:
    """Whether a JSON object has all of `keys`."""
    return lambda path: _read(path).keys() >= {*keys}


SIGNATURE = "<!-- written by ee-tuning: "


def signed(text: str) -> str:
    """A text for people to edit, with a last line by which it is known as long as nobody did."""
    return f"{text}{SIGNATURE}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def is_edited(path: Path) -> bool:
    """Whether there is a text that is not, or not any more, as it was `signed`."""
    return path.exists() and not _says(_is_signed, path)


def _is_signed(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return text == signed(text.rpartition(SIGNATURE)[0])


def _are_exits(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return all(re.match(r"\d+\.|vocabulary$", name) for name in file.keys())  # noqa: SIM118


def _are_metrics(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return not line.strip() or "step" in json.loads(line)


def _is_trace(path: Path) -> bool:
    return all(name.startswith("rank ") for name in _read(path))


# What is in these files if they are ours, and the names of files in these folders.
_FILES: dict[str, Callable[[Path], bool]] = {
    "exits.safetensors": _are_exits,
    "exit_config.json": _holds("format_version", "backbone", "layers"),
    "README.md": _is_signed,
    "run.yaml": _begins("# ee-tuning "),
    "metrics.jsonl": _are_metrics,
    "evaluation.json": _holds("exit_rows", "threshold_rows"),
    "calibration.json": _holds("thresholds", "epsilon", "delta"),
    "report.html": _begins("<title>Early exits of "),
    "trace.json": _is_trace,
    "trace.png": _begins("ee-tuning"),
}
_FOLDERS = {
    "checkpoints": r"checkpoints/\.*step-\d+(\.\w+)?/(old/|\.(state|exit_config)\.json\.\w+/)?"
    r"((exit|optimizer)-\d+\.safetensors|common\.safetensors|(state|exit_config)\.json|new|"
    r"evaluation\.json|calibration\.json|report\.html)",
    "tensorboard": r"tensorboard/events\.out\.tfevents\..*",
}
