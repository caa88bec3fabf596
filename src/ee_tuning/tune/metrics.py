"""What a run tells and records: its speed, its display, metrics.jsonl, TensorBoard or W&B."""

from __future__ import annotations

import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ee_tuning.errors import UserError
from ee_tuning.files import check_object, write_text
from ee_tuning.folders import Output


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and, if asked, to TensorBoard or W&B.

    validations: by step, what an earlier run has recorded of each exit's held-out loss.
    """

    def __init__(self, out: Output, log_to: str, first_step: int = 0) -> None:
        """Records after `first_step`, left by a run that was cut off, are dropped."""
        self.path = out.path / "metrics.jsonl"
        kept = _records(self.path) if self.path.exists() and first_step else []
        records = [record for record in kept if record["step"] <= first_step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        self.file = self.path.open("a", encoding="utf-8")
        self.validations = {
            record["step"]: {int(layer): loss for layer, loss in record["valid_loss"].items()}
            for record in records
            if "valid_loss" in record
        }
        self.sink = _SINKS[log_to](out)

    def write(self, step: int, **values: Any) -> None:
        """Record `values` (numbers, or numbers by exit layer) at `step`."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        self.sink(step, dict(_flat(values)))

    def let_go(self) -> None:
        """Keep nothing open by its path: the folder is about to be renamed."""
        self.sink.let_go()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        self.let_go()


def _records(path: Path) -> list[dict[str, Any]]:
    """What is recorded in a ``metrics.jsonl``, less a last line that a crash cut off.

    Raises:
        UserError: another line is no record.
    """
    lines, records = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not valid JSON: remove it") from error
        check_object(record, f"{path} line {number}", step=int)
        records.append(record)
    return records


class NoLog:
    """A `MetricsLog` of a process that does not record what belongs to the whole run."""

    validations: ClassVar[dict[int, dict[int, float]]] = {}

    def write(self, step: int, **values: Any) -> None:
        """Nothing."""

    def let_go(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _flat(values: dict[str, Any]) -> list[tuple[str, float]]:
    """``{"loss": {8: 2.0}}`` as ``loss/8: 2.0``."""
    pairs = []
    for name, value in values.items():
        items = value.items() if isinstance(value, dict) else [(None, value)]
        pairs += [(name if key is None else f"{name}/{key}", v) for key, v in items]
    return pairs


class _NoSink:
    """A second place for records, which there is none of."""

    def __init__(self, out: Output) -> None:
        """Nothing."""

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def let_go(self) -> None:
        """Nothing."""


class _TensorBoard(_NoSink):
    def __init__(self, out: Output) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.open = lambda: SummaryWriter(str(out.path / "tensorboard"))
        self.writer: SummaryWriter | None = None

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.writer = self.writer or self.open()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def let_go(self) -> None:
        """Close the file; what comes later is in another one."""
        if self.writer:
            self.writer.close()
        self.writer = None


class _WandB(_NoSink):
    def __init__(self, out: Output) -> None:
        import wandb

        folder = out.folder
        self.run = wandb.init(
            project="ee-tuning", dir=str(folder), name=folder.name, resume="allow"
        )

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)


_SINKS: dict[str, type[_NoSink]] = {"none": _NoSink, "tensorboard": _TensorBoard, "wandb": _WandB}


class OnTheWay:
    """Values on their way from a device to the host, which does not wait until it reads them."""

    def __init__(self, values: Tensor) -> None:
        self.values = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
        self.values.copy_(values, non_blocking=True)
        self.arrived = torch.cuda.Event() if values.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def read(self) -> list[float]:
        """The values (N,), once they have arrived."""
        if self.arrived:
            self.arrived.synchronize()
        return self.values.tolist()


class Speed:
    """Tokens per second since a run, or its continuation, began: without its first step, which
    compiles, once there are others."""

    def __init__(self) -> None:
        self.started = self.compiled = time.perf_counter()
        self.tokens = self.steps = 0

    def add(self, tokens: int) -> None:
        """A step has seen so many more."""
        if self.steps == 1:
            self.started, self.tokens = self.compiled, 0
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        if self.steps == 1:
            self.compiled = time.perf_counter()

    def __call__(self) -> float:
        """The mean up to now."""
        return self.tokens / max(1e-9, time.perf_counter() - self.started)


class Display:
    """What a run shows. This one logs what is said, and shows nothing else.

    `ee_tuning.commands.tune.Terminal` is for people.
    """

    def say(self, text: str) -> None:
        """One line for the user."""
        logging.getLogger("ee_tuning").info(text)

    def running(self, first: int, steps: int) -> AbstractContextManager[None]:
        """Inside, the steps from `first` (from 0) to `steps` are run."""
        return nullcontext()

    def advance(self, done: int, tokens_per_second: float) -> None:
        """`done` steps are done."""

    def losses(self, done: int, tokens_per_second: float, losses: dict[int, float]) -> None:
        """The mean loss of each exit in step `done`, now and then."""

    def result(self, before: dict[int, float], after: dict[int, float]) -> None:
        """The held-out loss of each exit, in nats per token, before and after the run."""
