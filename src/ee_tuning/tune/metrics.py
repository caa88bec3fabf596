"""What a run shows and records: the live display, metrics.jsonl, TensorBoard or W&B."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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


class Display:
    """The live line of a run: steps, tokens per second, time left, loss per exit."""

    def __init__(self, console: Console, first: int, steps: int) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("tuning"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=first, speed="", losses="")
        self.started, self.tokens = time.perf_counter(), 0

    def update(self, step: int, tokens: int) -> None:
        """`tokens` more have been seen; step `step` is done."""
        self.tokens += tokens
        speed = f"{self.tokens_per_second():,.0f} tok/s"
        self.progress.update(self.task, completed=step, speed=speed)

    def show(self, step: int, losses: dict[int, float]) -> None:
        """Show the latest losses; where there is no terminal, as a line of its own."""
        text = " ".join(f"{layer}:{loss:.3f}" for layer, loss in losses.items())
        self.progress.update(self.task, losses=f"loss {text}")
        if not self.console.is_terminal:
            self.console.print(
                f"step {step}  {self.tokens_per_second():,.0f} tok/s  loss {text}",
                soft_wrap=True, highlight=False,
            )  # fmt: skip

    def tokens_per_second(self) -> float:
        """Mean speed since the run, or its continuation, began."""
        return self.tokens / max(1e-9, time.perf_counter() - self.started)
