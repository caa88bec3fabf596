"""`ee-tuning tune`: the exits of a backbone, tuned on text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ee_tuning import tune as tuning
from ee_tuning.config import TuneConfig
from ee_tuning.exit_config import exit_name
from ee_tuning.parallel.mesh import own_rank
from ee_tuning.tune.metrics import Display


def tune(config: TuneConfig) -> None:
    """Tune, and say where the exits are; of several processes the first one says it.

    Raises:
        UserError, Interrupted, ProcessFailed: see `ee_tuning.tune.tune`.
    """
    tuning.tune(config, Terminal())
    if own_rank() == 0:
        print(f"exits saved in {config.out}")


class Terminal(Display):
    """The live line of a run: steps, tokens per second, time left, loss per exit.

    On standard error; where that is no terminal, losses are lines of their own.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("tuning"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def running(self, first: int, steps: int) -> Iterator[None]:
        """Inside, the steps from `first` (from 0) to `steps` are run."""
        self.task = self.progress.add_task("", total=steps, completed=first, speed="", losses="")
        with self.progress:
            yield

    def advance(self, done: int, tokens_per_second: float) -> None:
        """`done` steps are done."""
        self.progress.update(self.task, completed=done, speed=f"{tokens_per_second:,.0f} tok/s")

    def losses(self, done: int, tokens_per_second: float, losses: dict[int, float]) -> None:
        """The mean loss of each exit in step `done`."""
        text = " ".join(f"{exit_name(layer)}:{loss:.3f}" for layer, loss in losses.items())
        self.progress.update(self.task, losses=f"loss {text}")
        if not self.console.is_terminal:
            self.say(f"step {done}  {tokens_per_second:,.0f} tok/s  loss {text}")

    def result(self, before: dict[int, float], after: dict[int, float]) -> None:
        """The held-out loss of each exit, before and after."""
        table = Table(title="held-out loss (nats/token)")
        for column in ("exit layer", "before", "after"):
            table.add_column(column, justify="right")
        for layer in after:
            table.add_row(exit_name(layer), f"{before[layer]:.3f}", f"{after[layer]:.3f}")
        self.console.print(table)
