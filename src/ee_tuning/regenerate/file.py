"""The file that waves are written to, and how far it is: beside it, in a hidden file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ee_tuning.errors import UserError
from ee_tuning.files import (
    check_object,
    check_writable,
    read_object,
    replacing,
    write_json,
    writing,
)
from ee_tuning.regenerate.writer import Written, key_of

FORMAT = 1


@dataclass
class Totals:
    """Of the texts in a file: how many, tokens that the model wrote, how many of each source; and
    how many were left out, by the reason."""

    texts: int = 0
    tokens: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def add(self, one: Written) -> None:
        """Count a text, which is in the file or left out."""
        if one.left_out:
            self.left_out[one.left_out] = self.left_out.get(one.left_out, 0) + 1
            return
        self.texts, self.tokens = self.texts + 1, self.tokens + one.tokens
        self.sources[one.source] = self.sources.get(one.source, 0) + 1


@dataclass
class State:
    """How far a file is.

    settings: that the texts follow from, with what the model and the data are. slots: texts of a
    wave. waves: whole ones in the file; size: the bytes of these; totals: of these. end: totals
    and size with the part of the last wave that was enough, once there is one.
    """

    settings: dict[str, Any]
    slots: int
    waves: int = 0
    size: int = 0
    totals: Totals = field(default_factory=Totals)
    end: dict[str, Any] | None = None

    def copied(self) -> Totals:
        """The totals, to count on."""
        return Totals(**json.loads(json.dumps(asdict(self.totals))))


class OutFile:
    """The file that ``--out`` names, on the process that writes it."""

    def __init__(self, out: str) -> None:
        """out: as the user gave it.

        Raises:
            UserError: it is no name of a JSONL file.
        """
        self.path = Path(out)
        if not out or self.path.suffix != ".jsonl" or self.path.is_dir():
            raise UserError(f"out is {out!r}: name the file to write with --out, as own.jsonl")
        self.state_path = self.path.with_name(f".{self.path.name}.regenerate.json")

    def claim(self, resume: bool, overwrite: bool) -> State | None:
        """How far an earlier run came that is gone on with; None for a new file.

        Raises:
            UserError: there is a file, and what to do with it was not said, or it is not ours.
        """
        if resume and overwrite:
            raise UserError("resume and overwrite exclude each other: leave one out")
        check_writable(self.path.parent)
        if not self.path.exists():
            return None
        if not self.state_path.exists():
            raise UserError(
                f"{self.path} exists, and regenerate did not write it: choose another --out"
            )
        if overwrite:
            return None
        if not resume:
            raise UserError(
                f"{self.path} exists: go on with --resume, or replace it with --overwrite"
            )
        try:
            return self._read_state()
        except UserError as error:
            raise UserError(f"{error}: begin again with --overwrite") from None

    def _read_state(self) -> State:
        """How far the run came that wrote the file.

        Raises:
            UserError: it does not say so, or no longer.
        """
        saved = read_object(self.state_path)
        if saved.pop("format_version", None) != FORMAT:
            raise UserError(f"{self.state_path} is of another version")
        kinds = {"settings": dict, "slots": int, "waves": int, "size": int, "totals": dict}
        check_object(saved, str(self.state_path), **kinds)
        state = State(**saved | {"totals": Totals(**saved["totals"])})
        if self.path.stat().st_size < state.size:
            raise UserError(f"{self.path} was changed since")
        return state

    def keys(self, state: State) -> list[str]:
        """Of the records in the whole waves, what later ones must not have again."""
        if not self.path.exists() or not state.size:
            return []
        try:
            with self.path.open("rb") as file:
                return [key_of(json.loads(line)) for line in file.read(state.size).splitlines()]
        except (ValueError, LookupError, TypeError) as error:  # no records any more
            raise UserError(
                f"{self.path} was changed since: begin again with --overwrite"
            ) from error

    def append(self, state: State, lines: bytes, start: int) -> None:
        """Write `lines` from byte `start` on, and then how far the file is."""
        if not start:  # what is to be replaced stays until there is something new
            empty = State(state.settings, state.slots)
            self._save(empty)
            with replacing(self.path) as temporary:
                temporary.write_bytes(lines)
        else:
            with writing(self.path), self.path.open("r+b") as file:
                file.truncate(start)
                file.seek(start)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        self._save(state)

    def _save(self, state: State) -> None:
        write_json(self.state_path, {"format_version": FORMAT, **asdict(state)})
