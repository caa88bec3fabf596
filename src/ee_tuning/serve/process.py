"""The process of the engine, which loads what it needs while the server's does the same."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from ee_tuning.errors import Notice, ProcessFailed
from ee_tuning.serve.config import ServeConfig


@contextmanager
def in_a_process(config: ServeConfig, ready: Callable[[], None]) -> Iterator[Connection]:
    """Inside, a process does `ee_tuning.serve.core.run` at the other end of this connection.

    Raises:
        ProcessFailed: it is gone, where that matters inside, as an EOFError.
    """
    context = get_context("spawn")
    own, other = context.Pipe()
    level = logging.root.manager.disable
    process = context.Process(target=_main, args=(config, other, ready, level), name="engine")
    try:
        if sys.platform != "win32":
            resource_tracker.ensure_running()  # which lets signals through when it has started
        with _held(signal.SIGINT, signal.SIGTERM):  # this process says when it is over
            process.start()
        other.close()
        yield own
    except EOFError:
        process.join()
        raise ProcessFailed(f"the engine's process ended with status {process.exitcode}") from None
    finally:
        if process.pid is not None:
            process.kill()  # there is nothing that it has to keep
            process.join()
        own.close()


@contextmanager
def _held(*signals: signal.Signals) -> Iterator[None]:
    """These wait meanwhile, in whatever thread they come, and never reach what is started here."""
    heard = list[int]()
    before = [signal.signal(one, lambda number, _: heard.append(number)) for one in signals]
    if sys.platform != "win32":  # a process has its own there
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
        for number in heard:
            signal.raise_signal(number)


def _main(
    config: ServeConfig, connection: Connection, ready: Callable[[], None], level: int
) -> None:
    """level: of logs that are not shown, as in the process of the server."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.disable(level)
    warnings.simplefilter("ignore")
    from ee_tuning.serve.core import run  # and all that decodes: not what this module is for
    from ee_tuning.serve.messages import Warned, send

    def warned(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        send(connection, Warned(str(message), category))

    warnings.simplefilter("default", Notice)
    warnings.showwarning = warned
    run(config, connection, ready)


def _end_with_parent() -> None:
    """At once: there is nothing to keep, and nobody to tell."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
