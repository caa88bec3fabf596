"""What a run tells and records: its speed, its display, metrics.jsonl, TensorBoard or W&B."""

from __future__ import annotations

import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.errors import UserError
from ee_tuning.files import write_text


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and, if asked, to TensorBoard or W&B."""

    def __init__(self, folder: Path, log_to: str, first_step: int = 0) -> None:
        """Records after `first_step`, left by a run that was cut off, are dropped."""
        self.path = folder / "metrics.jsonl"
        kept = self.path.read_text().splitlines() if self.path.exists() and first_step else []
        records = [json.loads(line) for line in kept]
        records = [record for record in records if record["step"] <= first_step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        self.file = self.path.open("a", encoding="utf-8")
        losses = [record["valid_loss"] for record in records if "valid_loss" in record]
        self.first_validation = {int(k): v for k, v in losses[0].items()} if losses else None
        self.sink = _SINKS[log_to](folder)

    def write(self, step: int, **values: Any) -> None:
        """Record `values` (numbers, or numbers by exit layer) at `step`."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        self.sink(step, dict(_flat(values)))

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class NoLog:
    """A `MetricsLog` of a process that does not record what belongs to the whole run."""

    first_validation = None

    def write(self, step: int, **values: Any) -> None:
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


def _no_sink(folder: Path) -> Any:
    return lambda step, values: None


def _tensorboard_sink(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--log-to tensorboard needs: pip install tensorboard") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb_sink(folder: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("--log-to wandb needs: pip install wandb") from error
    run = wandb.init(project="ee-tuning", dir=str(folder), name=folder.name, resume="allow")
    return lambda step, values: run.log(values, step=step)


_SINKS = {"none": _no_sink, "tensorboard": _tensorboard_sink, "wandb": _wandb_sink}


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
    """Tokens per second since a run, or its continuation, began."""

    def __init__(self) -> None:
        self.started, self.tokens = time.perf_counter(), 0

    def add(self, tokens: int) -> None:
        """So many more have been seen."""
        self.tokens += tokens

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
