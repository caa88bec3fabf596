"""Which files of a folder are data, and what they are read as."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ee_tuning.data.readers import READERS, Reader, Record, read_text
from ee_tuning.data.streams import kind, reading, reading_text
from ee_tuning.errors import Notice, UserError
from ee_tuning.files import read_object

RECORDS = (".jsonl", ".parquet", ".arrow")  # if a folder has any, the rest is about them
PERHAPS_RECORDS = (".json", ".csv", ".tsv")  # records, unless beside texts and sources
ABOUT = ("readme", "license", "licence", "citation", "notice", "changelog")
INFOS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Nobody means these as text, and to pass over them would be to leave out what was meant.
NO_TEXT = (
    ".7z", ".avro", ".bin", ".ckpt", ".db", ".doc", ".docx", ".epub", ".feather", ".gguf", ".h5",
    ".hdf5", ".idx", ".lz4", ".mds", ".npy", ".npz", ".orc", ".pdf", ".pickle", ".pkl", ".pt",
    ".pth", ".rar", ".safetensors", ".sqlite", ".tar", ".tfrecord", ".tgz", ".xls", ".xlsx", ".zip",
)  # fmt: skip


def walk(folder: Path) -> Iterator[Path]:
    """All files below `folder` that are not empty, in a fixed order, without hidden ones."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(root, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path.is_file() and path.stat().st_size > 0)


def saved_folder(folder: Path, split: str) -> Path | None:
    """The folder of `split`, or of ``train``, if ``save_to_disk`` of datasets wrote `folder`.

    Raises:
        UserError: it has no such split.
    """
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        if split:
            raise UserError(
                f"data {folder}#{split}: it was saved without splits, leave #{split} out"
            )
        return folder
    if not (folder / "dataset_dict.json").is_file():
        return None
    splits = read_object(folder / "dataset_dict.json", splits=list[str])["splits"]
    wanted = split or (splits[0] if len(splits) == 1 else "train")
    if wanted not in splits:
        raise UserError(
            f"data {folder} has no split {wanted}: name one of {', '.join(splits)}, as {folder}#"
            f"{splits[0] if splits else 'train'}"
        )
    return folder / wanted


def folder_files(name: str, folder: Path) -> list[tuple[Path, Reader]]:
    """The files of a folder that are read, each with the function that reads it.

    Its JSONL, parquet and Arrow files, if it has any. If there is nothing else but what is about
    them: its JSON and CSV files, as records. Else every text, JSON and CSV too, as it stands.

    Raises:
        UserError: there are none, or one that cannot be meant as text.
    """
    files = list(walk(folder))
    if not files:
        raise UserError(f"data folder {name} has no files to read: name one with text in it")
    records = [path for path in files if kind(path) in RECORDS and not _is_cache(path)]
    others = [path for path in files if not path.name.lower().startswith(ABOUT)]
    if not records and others and all(kind(path) in PERHAPS_RECORDS for path in others):
        records = others
    if records:
        _tell_left_out(name, [path for path in others if path not in set(records)])
        return [(path, READERS[kind(path)]) for path in records]
    for path in files:
        if path.suffix.lower() in NO_TEXT or kind(path) in NO_TEXT:
            raise UserError(
                f"data folder {name}: {path} cannot be meant as text: name the files that are, for "
                f"example '{folder}/**/*.txt'"
            )
    return [(path, read_text_or_nothing) for path in files]


def _tell_left_out(name: str, left: list[Path]) -> None:
    """Say that files stand beside records and are not read, but for descriptions of them."""
    left = [path for path in left if path.suffix.lower() != ".md" and path.name not in INFOS]
    if left:
        warnings.warn(
            f"data folder {name} holds records; {len(left)} other files in it are not read, such "
            f"as {left[0].name}",
            Notice,
            stacklevel=2,
        )


def _is_cache(path: Path) -> bool:
    """Whether `path` is what ``Dataset.map`` leaves beside the data."""
    return path.name.startswith("cache-") and path.suffix == ".arrow"


def read_text_or_nothing(path: Path) -> Iterator[Record]:
    """A file of a folder, or nothing if it is not text: folders hold pictures, too."""
    try:
        with reading(path) as stream:
            text = reading_text(stream)
            if any("\0" in chunk for chunk in iter(lambda: text.read(2**20), "")):
                return
    except UnicodeDecodeError:
        return
    yield from read_text(path)
