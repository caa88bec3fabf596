"""What calibration found: thresholds with the guarantee that they have, and what it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from ee_tuning.errors import UserError
from ee_tuning.files import check_object

CALIBRATED = "calibrated"  # as a threshold: those of the certificate
VERSION = 1
KINDS = {  # of the values in a `calibration.json`
    "thresholds": dict, "exits": dict, "backbone": dict, "report": dict, "risk": str, "dtype": str,
    "measure": str, "n": int, "max_pending": int, "max_new_tokens": int, "epsilon": int | float,
    "delta": int | float,
}  # fmt: skip

Key = TypeVar("Key")


@dataclass(frozen=True)
class ExitsRead:
    """Hashes of the exits that several processes share, when these had read them: `whole`, of
    each exit, and `own`, of what this process has of them; and of each part of the `backbone`."""

    whole: dict[int, str]
    own: dict[int, str]
    backbone: dict[str, str]


@dataclass(frozen=True)
class Certificate:
    """With probability 1 − `delta`, the `risk` of `thresholds` is at most `epsilon`.

    thresholds: by exit layer, 1 where the exit is off. test: that passed with p-value `p` on `n`
    prompts, whose mean loss was `tested`; beside: p-values of other tests. report: risk, low, high,
    n and mean depth on prompts that neither chose nor tested. exits: a hash of each exit's weights.
    backbone: one of each part, see `ee_tuning.fingerprint.tensor_hashes`.
    data: a hash of the prompts. path: what was tested, from careful to bold. The others are the
    settings that it holds for.
    """

    thresholds: dict[int, float]
    risk: str
    epsilon: float
    delta: float
    n: int
    p: float | None
    test: str
    tested: float
    report: dict[str, Any]
    exits: dict[int, str]
    backbone: dict[str, str]
    dtype: str
    measure: Any
    max_pending: int
    max_new_tokens: int
    data: str
    machine: str = ""
    beside: dict[str, float] = field(default_factory=dict)
    path: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_layers(self) -> list[int | str]:
        """The active exits, by depth."""
        return sorted(self.thresholds)

    def to_json(self) -> dict[str, Any]:
        """What is written to ``calibration.json``."""
        return {"format_version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, saved: Any, where: str) -> Certificate:
        """What `to_json` gave.

        Raises:
            UserError: it is no such thing, or of another version; `where` it was read.
        """
        needed = {one.name for one in fields(cls)}
        lacking = sorted(needed - saved.keys()) if isinstance(saved, dict) else ["everything"]
        if lacking or saved.get("format_version") != VERSION:
            reason = f"lacks {', '.join(lacking)}" if lacking else "is of another version"
            raise UserError(f"{where} {reason}")
        check_object(saved, where, **KINDS)
        values = {name: saved[name] for name in needed}
        for name, kind in (("thresholds", int | float), ("exits", str)):
            if not all(k.isdecimal() and isinstance(v, kind) for k, v in saved[name].items()):
                raise UserError(f"{where} is damaged: {name} are by numbers of layers")
            values[name] = {int(layer): value for layer, value in saved[name].items()}
        return cls(**values)


def changed(
    what: str,
    now: Mapping[Key, str],
    certified: Mapping[Key, str],
    read: tuple[Mapping[Key, str], Mapping[Key, str]] | None,
) -> list[str]:
    """The parts of a model whose hash is not the one that is certified, as messages call them.

    what: a part is called so. now: of what this process has of each. read: where several
    processes share the parts, what these hashes were when they were read, and those of the whole.

    Raises:
        UserError: what this process has of a part changed since, of which the others do not know.
    """
    if read is not None:
        own, whole = read
        others = [part for part, value in now.items() if value != own[part]]
        if others:
            raise UserError(
                f"the {what.format(others[0])}, which several processes share, was changed after "
                "it was read: the calibration does not hold any more, give a threshold"
            )
        now = whole
    return [what.format(part) for part, value in now.items() if value != certified.get(part)]
