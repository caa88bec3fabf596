"""From settings to what is served."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.connection import Connection

from transformers import PreTrainedTokenizerBase

from ee_tuning.calibrate.audit import Audit
from ee_tuning.certificate import CALIBRATED
from ee_tuning.data.chats import with_template
from ee_tuning.decode.settings import make_policy
from ee_tuning.errors import SecurityNotice, UserError
from ee_tuning.loading import load_tokenizer
from ee_tuning.serve.app import Served
from ee_tuning.serve.config import ServeConfig
from ee_tuning.serve.messages import Facts, Warned, receive
from ee_tuning.serve.metrics import Metrics
from ee_tuning.serve.process import in_a_process
from ee_tuning.serve.reading import Reader
from ee_tuning.serve.worker import Worker
from ee_tuning.serve.writer import Log
from ee_tuning.settings import changed

Engine = Callable[[ServeConfig, Callable[[], None]], AbstractContextManager[Connection]]


def _nothing() -> None:
    """There is nothing to do."""


@contextmanager
def served(
    config: ServeConfig,
    log: Log,
    ready: Callable[[], None] = _nothing,
    engine: Engine = in_a_process,
) -> Iterator[Served]:
    """Inside, the model of these settings can be served; it is not warmed up yet.

    ready: called when it is, here and where the engine is. engine: what does
    `ee_tuning.serve.process.run` at the other end of a connection.

    Raises:
        UserError: settings that make no sense, a model that cannot be had, or K/V that do not fit.
        ProcessFailed: the engine's process has ended.
    """
    check_settings(config)
    name = (config.exits or config.model).rstrip("/")
    with engine(config, ready) as connection:
        facts = _facts(connection)
        tokenizer = with_template(_tokenizer(facts, config), config.chat_template)
        found = facts.calibration
        audited = config.audit and found is not None and found.risk == "next-token"
        audit = Audit(found, config.audit) if audited else None
        metrics = Metrics(name, audit)
        worker = Worker(
            connection, config.slots, config.max_queue, config.deadline, metrics, log, audit, ready
        )
        leaving = config.leaving(threshold=config.threshold, lookup=config.lookup)
        make = partial(worker.ask, make_policy)
        reader = Reader(facts, make, tokenizer, leaving, config.mode)
        reader.check_defaults()
        yield Served(name, reader, worker, [config.measure], config.lookup)


def _facts(connection: Connection) -> Facts:
    """Of the model, when it is loaded.

    Raises:
        UserError: why it cannot be.
    """
    while not isinstance(said := receive(connection), Facts):
        if isinstance(said, UserError):
            raise said
        assert isinstance(said, Warned)
        warnings.warn(said.said, said.category, stacklevel=1)
    return said


def _tokenizer(facts: Facts, config: ServeConfig) -> PreTrainedTokenizerBase:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityNotice)  # which the engine's process has given
        return load_tokenizer(facts.source, facts.size, config.trust_remote_code)


def check_settings(config: ServeConfig) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        UserError: nothing to serve, or a number out of its range.
    """
    if not config.exits and not config.model:
        raise UserError("nothing to serve: name exits with --exits, or a backbone with --model")
    drafts = config.lookup and config.mode == "speculative"
    if not config.exits and config.mode not in ("auto", "full") and not drafts:
        raise UserError(f"mode {config.mode} needs exits: give them with --exits")
    of_exits = changed(config, ("threshold", "exit_layers", "min_depth"))
    if of_exits and not config.exits and not config.lookup:
        raise UserError(f"{of_exits[0]} needs exits: give them with --exits")
    leaves = config.mode == "auto" and config.threshold == CALIBRATED
    if config.lookup and (leaves or config.mode not in ("auto", "speculative")):
        mode = "auto with calibrated thresholds" if leaves else config.mode
        raise UserError(f"lookup is not possible with mode {mode}: use mode speculative")
    for name, least in (
        ("slots", 1),
        ("capacity", 0),
        ("max_queue", 1),
        ("port", 0),
        ("audit", 0),
    ):
        if getattr(config, name) < least:
            raise UserError(f"{name} is {getattr(config, name)}: give {least} or more")
    if config.capacity == 1:
        raise UserError("capacity is 1: give 2 or more, for a prompt and what follows it")
    if config.port > 65535:
        raise UserError(f"port is {config.port}: give 65535 or less")
    if not config.deadline > 0 or not config.grace >= 0:
        raise UserError("deadline and grace are seconds: give more than 0, or 0 for grace")
