"""The timeline of a step: what every process did when, drawn as a Gantt chart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ee_tuning.files import replacing, write_json
from ee_tuning.parallel.mesh import Mesh

COLOURS = {"exit work": "tab:orange", "forward": "tab:blue", "waiting": "lightgrey"}
Event = tuple[str, float, float]  # what, from, to: seconds of the host's clock


class Timeline:
    """What this process does while it is `on`; nothing is recorded, or takes time, before."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[Event] = []

    @contextmanager
    def record(self, what: str) -> Iterator[None]:
        """Inside, the process does `what`, one of `COLOURS`. On a GPU, its queue is emptied."""
        if not self.on:
            yield
            return
        started = _now()
        yield
        self.events.append((what, started, _now()))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def span(events: list[list[Event]]) -> tuple[float, float]:
    """When the first event of all processes begins and the last one ends."""
    starts, stops = zip(*((start, stop) for own in events for _, start, stop in own), strict=True)
    return min(starts), max(stops)


def idle_share(events: list[list[Event]]) -> float:
    """The share of time, from the first event to the last, that processes are not busy."""
    spans = [_busy(own) for own in events]
    first, last = span(events)
    return 1 - sum(spans) / (len(events) * (last - first))


def _busy(events: list[Event]) -> float:
    """Seconds in which something other than waiting went on; events follow one another."""
    return sum(stop - start for what, start, stop in events if what != "waiting")


def save_timeline(timeline: Timeline, mesh: Mesh, folder: Path) -> float:
    """Write every process's events as ``trace.json`` and ``trace.png``; gives the idle share."""
    names = mesh.gather_on_host(mesh.name)
    events = mesh.gather_on_host(timeline.events)
    if mesh.is_main:
        write_json(folder / "trace.json", dict(zip(names, events, strict=True)))
        with replacing(folder / "trace.png") as temporary:
            draw(names, events, temporary)
    return idle_share(events)


def draw(names: list[str], events: list[list[Event]], path: Path) -> None:
    """A row per process, a bar per event."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, _ = span(events)
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.5 * len(names)), layout="constrained")
    for what, colour in COLOURS.items():
        for row, own in enumerate(events):
            bars = [((a - first) * 1e3, (b - a) * 1e3) for kind, a, b in own if kind == what]
            axes.broken_barh(bars, (row - 0.4, 0.8), color=colour, label=what if not row else None)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(f"one step; {idle_share(events):.0%} idle")
    figure.legend(loc="outside lower center", ncols=len(COLOURS))
    figure.savefig(path, dpi=120, metadata={"Software": "ee-tuning"})
    pyplot.close(figure)
