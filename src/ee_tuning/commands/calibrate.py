"""`ee-tuning calibrate`: the lowest threshold with a guarantee."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ee_tuning.calibrate import run
from ee_tuning.calibrate.config import CalibrateConfig
from ee_tuning.calibrate.walk import Step
from ee_tuning.certificate import Certificate
from ee_tuning.exit_config import threshold_text
from ee_tuning.parallel.mesh import own_rank

SHOWN = 12  # steps of a walk in the table


def calibrate(config: CalibrateConfig, console: Console | None = None) -> Certificate:
    """Calibrate, print what was tested and what was found; of several processes the first prints.

    Raises:
        UserError, ProcessFailed: see `ee_tuning.calibrate.calibrate`.
    """
    console, terminal = console or Console(quiet=own_rank() != 0), Terminal()
    found = run.calibrate(config, terminal)
    console.print(table(terminal.steps, found))
    for line in summary(found):
        console.print(line, highlight=False, soft_wrap=True)
    return found


class Terminal(run.Display):
    """Progress on standard error; keeps the steps of the walk."""

    def __init__(self) -> None:
        self.console, self.steps = Console(stderr=True), list[Step]()

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def writing(self, tokens: int) -> Iterator[Callable[[int], None]]:
        """Inside, up to so many tokens are written."""
        columns = TextColumn("texts of full depth"), BarColumn(bar_width=24), TaskProgressColumn()
        shown = self.console.is_terminal
        bar = Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not shown)
        task = bar.add_task("", total=tokens)
        with bar:
            yield lambda more: bar.advance(task, more)

    def step(self, step: Step) -> None:
        """A candidate was tested."""
        self.steps.append(step)


def table(steps: list[Step], found: Certificate) -> Table:
    """The last steps of the walk, from careful to bold."""
    shown = Table(
        title=f"risk {found.risk}, tested on {found.n:,} prompts",
        caption=f"p: {found.test}; beside it Hoeffding–Bentkus",
    )
    for column in ("threshold", "mean depth", "mean loss", "p", "p beside", ""):
        shown.add_column(column, justify="right", no_wrap=True)
    for step in steps[-SHOWN:]:
        depth = "" if step.depth != step.depth else f"{step.depth:.1f}"
        shown.add_row(
            threshold_text(step.thresholds), depth, f"{step.risk:.4f}", f"{step.p:.4f}",
            f"{step.beside:.4f}", "passed" if step.p <= found.delta else "failed",
        )  # fmt: skip
    return shown


def summary(found: Certificate) -> list[str]:
    """What was proven, and what other prompts show."""
    if found.p is None:
        return [
            "no threshold passed: the answer is 1, full depth; more prompts or a larger epsilon "
            "may prove one"
        ]
    report = found.report
    depth = f", mean depth {report['depth']:.1f}" if report.get("depth") is not None else ""
    return [
        f"threshold {threshold_text(found.thresholds)}: with probability {1 - found.delta:g} the "
        f"risk is at most {found.epsilon:g} (p {found.p:.4f})",
        f"on {report['n']:,} prompts that had no part in it: {report['risk']:.4f} "
        f"({report['low']:.4f}–{report['high']:.4f}){depth}",
        "saved with the exits: generate --calibrated uses it",
    ]
