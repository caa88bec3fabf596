"""Commands as a user gives them, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ee_tuning.cli import main

PATIENCE = 600  # seconds that a process may take: a machine may be busy


def arguments(base: Any, data: Any, out: Any, **changes: Any) -> list[str]:
    """Flags of a small run; `changes` add to them or, with None, leave one out."""
    values = {
        "model": base, "layers": "1,3", "arch": "mlp", "data": data, "out": out, "steps": 6,
        "seq-length": 32, "micro-batch-size": 2, "global-batch-size": 4, "lr": 1e-2,
        "save-every": 2, "eval-every": 2, "log-every": 1, "valid-fraction": 0.1,
    } | {name.replace("_", "-"): value for name, value in changes.items()}  # fmt: skip
    flags = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def tune(*args: Any, **changes: Any) -> None:
    """`ee-tuning tune` with `arguments`."""
    main(["tune", *arguments(*args, **changes)])


def records(out: str | Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def fails(capsys: pytest.CaptureFixture, *args: Any, status: int = 2) -> str:
    """The one line a failing command leaves on stderr."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == status
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("ee-tuning:") and "warning" not in line
    ]
    assert len(lines) == 1
    return lines[0]


def read_all(folder):
    """The bytes of every file below `folder`, by path."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
