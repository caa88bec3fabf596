"""`ee-tuning regenerate`: data that the model writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from ee_tuning.parallel.mesh import own_rank
from ee_tuning.regenerate import run
from ee_tuning.regenerate.config import RegenerateConfig


def regenerate(config: RegenerateConfig) -> None:
    """Write the file, and say what is in it; of several processes the first one says it.

    Raises:
        UserError, Interrupted, ProcessFailed: see `ee_tuning.regenerate.run.regenerate`.
    """
    totals = run.regenerate(config, Terminal())
    if own_rank() != 0:
        return
    sources = ", ".join(f"{number:,} from {name}" for name, number in totals.sources.items())
    print(f"{config.out}: {totals.texts:,} texts, {totals.tokens:,} tokens; {sources}")
    if totals.left_out:
        reasons = ", ".join(f"{name} {number:,}" for name, number in totals.left_out.items())
        print(f"left out: {reasons}")


class Terminal(run.Display):
    """The live line of a run, on standard error: tokens, tokens per second, time left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("writing"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f} tokens"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tokens = 0

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def running(self, done: int, tokens: int) -> Iterator[None]:
        """Inside, tokens are written: so many of so many are there."""
        self.tokens = tokens
        self.task = self.progress.add_task("", total=tokens, completed=done, speed="")
        with self.progress:
            yield

    def advance(self, tokens: int) -> None:
        """So many tokens more were written."""
        speed = self.progress.tasks[self.task].speed
        shown = f"{speed:,.0f} tok/s" if speed else ""
        self.progress.update(self.task, advance=tokens, speed=shown)

    def settled(self, done: int) -> None:
        """So many tokens are in the file: what was left out does not count."""
        self.progress.update(self.task, completed=done)
        if not self.console.is_terminal:
            self.say(f"{done:,} of {self.tokens:,} tokens")
