"""From what the engine settles to what clients hear of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ee_tuning.calibrate.audit import Audit
from ee_tuning.serve.choices import Choice, Delta
from ee_tuning.serve.errors import explained, line_of
from ee_tuning.serve.jobs import Job
from ee_tuning.serve.messages import Settled
from ee_tuning.serve.metrics import Metrics

Log = Callable[[dict[str, Any]], None]


class News(NamedTuple):
    """What steps of the engine have brought a text, or why there is no more of it."""

    job: Job
    choice: Choice
    said: Settled | Exception


class Writer:
    """Makes text of tokens while the engine computes the next ones."""

    def __init__(
        self, metrics: Metrics, log: Log, audit: Audit | None, cancel: Callable[[Choice], None]
    ) -> None:
        """audit: of some texts. cancel: lets the engine give up what has ended."""
        self.metrics, self.log, self.audit, self.cancel = metrics, log, audit, cancel

    def write(self, news: Iterable[News]) -> None:
        """Give every job what it has more of."""
        deltas: dict[Job, list[Delta]] = {}
        for job, choice, said in news:
            if choice.finish is not None or job.given_up:
                continue
            try:
                if isinstance(said, Exception):
                    raise said
                delta = self._text(job, choice, said)
            except Exception as error:  # of this text: it ends alone
                if line := line_of(error):
                    self.log(line)
                delta = Delta(choice.index, error=explained(error))
                choice.finish = "error"
                self.metrics.gave_up("error")
            deltas.setdefault(job, []).append(delta)
            if choice.finish is not None:
                self.cancel(choice)
        for job, own in deltas.items():
            job.give(own)

    def _text(self, job: Job, choice: Choice, settled: Settled) -> Delta:
        begins = not choice.layers
        delta = choice.put(settled)
        delta.tokens[-1].ends = choice.finish is not None
        if self.audit is not None:
            for token in delta.tokens:
                self.audit.take(choice.request, token)
        if begins:
            self.metrics.said_first(choice, job.submitted)
        self.metrics.settled(delta)
        if choice.finish is not None:
            self.metrics.ended(choice, job.submitted)
        return delta
