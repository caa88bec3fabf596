"""From what the engine settles to what clients hear of, in the thread that serves them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ee_tuning.calibrate.audit import Audit
from ee_tuning.decode import Request
from ee_tuning.errors import UserError, first_line
from ee_tuning.serve.choices import Choice, Delta, Settled
from ee_tuning.serve.errors import Refused
from ee_tuning.serve.jobs import Job
from ee_tuning.serve.metrics import Metrics

Log = Callable[[dict[str, Any]], None]


class News(NamedTuple):
    """What a step of the engine has brought a text, or why there is no more of it."""

    job: Job
    choice: Choice
    said: Settled | Exception


class Writer:
    """Makes text of tokens while the engine computes the next ones."""

    def __init__(
        self, metrics: Metrics, log: Log, audit: Audit | None, cancel: Callable[[Request], None]
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
                delta = Delta(choice.index, error=self.explained(error))
                choice.finish = "error"
                self.metrics.gave_up("error")
            deltas.setdefault(job, []).append(delta)
            if choice.finish is not None:
                self.cancel(choice.request)
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

    def explained(self, error: Exception) -> Exception:
        """What a client is told of a mistake; if it is none of its own, it is logged whole."""
        if isinstance(error, Refused):
            return error
        if isinstance(error, UserError):
            return Refused(str(error))
        self.log_error(error)
        return Refused(f"the request failed: {first_line(error)}", status=500)

    def log_error(self, error: Exception) -> None:
        """A line with its traceback."""
        lines = traceback.format_exception(error)
        self.log({"event": "error", "error": first_line(error), "traceback": "".join(lines)})
