"""From settings to what is served."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

from transformers import PreTrainedTokenizerBase

from ee_tuning.calibrate.audit import Audit
from ee_tuning.certificate import CALIBRATED
from ee_tuning.data.chats import with_template
from ee_tuning.decode.settings import make_policy
from ee_tuning.errors import SecurityNotice, UserError
from ee_tuning.exit_config import parse_threshold
from ee_tuning.loading import load_tokenizer
from ee_tuning.serve.app import Served
from ee_tuning.serve.config import ServeConfig
from ee_tuning.serve.messages import Facts, Warned, receive
from ee_tuning.serve.metrics import Metrics
from ee_tuning.serve.reading import Reader
from ee_tuning.serve.worker import Worker
from ee_tuning.serve.writer import Log


def load_served(
    config: ServeConfig,
    connection: Connection,
    log: Log,
    ready: Callable[[], None] = lambda: None,
) -> Served:
    """What is served by an engine that is loaded at the other end of a connection, see
    `ee_tuning.serve.core.run`; it is not warmed up yet.

    ready: called when it is.

    Raises:
        UserError: settings that make no sense, a model that cannot be had, or K/V that do not fit.
        EOFError: the other end is gone.
    """
    name = (config.exits or config.model).rstrip("/")
    facts = _facts(connection)
    tokenizer = with_template(_tokenizer(facts, config), config.chat_template)
    found = facts.calibration
    audited = config.audit and found is not None and found.risk == "next-token"
    audit = Audit(found, config.audit) if audited else None
    metrics = Metrics(name, audit)
    worker = Worker(
        connection, config.slots, config.max_queue, config.deadline, metrics, log, audit, ready
    )
    threshold = config.threshold
    if isinstance(threshold, str) and threshold != CALIBRATED:
        threshold = parse_threshold(threshold)
    leaving = config.leaving(threshold=threshold, lookup=config.lookup)
    make = partial(worker.ask, make_policy)
    reader = Reader(facts, make, tokenizer, leaving, config.mode)
    reader.check_defaults()
    return Served(name, reader, worker, [config.measure], config.lookup)


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
