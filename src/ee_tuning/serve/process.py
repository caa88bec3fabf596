"""The process of the engine: it loads the model, and decodes until the server is gone."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from transformers import PreTrainedTokenizerBase

from ee_tuning.decode import Engine
from ee_tuning.decode.arguments import end_tokens
from ee_tuning.decode.engines import engines_of
from ee_tuning.decode.load import tokenizer_of
from ee_tuning.decode.settings import active_layers
from ee_tuning.devices import pick_device, pick_dtype
from ee_tuning.errors import Notice, ProcessFailed, UserError
from ee_tuning.exit_config import DRAFT, LOOKUP, ExitConfig
from ee_tuning.model import Network
from ee_tuning.serve.config import ServeConfig
from ee_tuning.serve.core import Core
from ee_tuning.serve.messages import Facts, Warned, send
from ee_tuning.share import New, Saved, Share, load

CAPACITY = 4096  # tokens of a text, where the backbone's context has room for them


@contextmanager
def in_a_process(config: ServeConfig, ready: Callable[[], None]) -> Iterator[Connection]:
    """Inside, there is a process that does `run`, at the other end of this connection.

    Raises:
        ProcessFailed: it is gone, where that matters inside, as an EOFError.
    """
    context = get_context("spawn")
    own, other = context.Pipe()
    level = logging.root.manager.disable
    process = context.Process(target=_main, args=(config, other, ready, level), name="engine")
    with _ignored(signal.SIGINT, signal.SIGTERM):  # by it: this process says when it is over
        process.start()
    other.close()
    try:
        yield own
    except EOFError:
        process.join()
        raise ProcessFailed(f"the engine's process ended with status {process.exitcode}") from None
    finally:
        process.kill()  # there is nothing that it has to keep
        process.join()
        own.close()


@contextmanager
def _ignored(*signals: signal.Signals) -> Iterator[None]:
    before = [signal.signal(one, signal.SIG_IGN) for one in signals]
    try:
        yield
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)


def _main(
    config: ServeConfig, connection: Connection, ready: Callable[[], None], level: int
) -> None:
    """level: of logs that are not shown, as in the process of the server."""
    logging.disable(level)
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", Notice)

    def warned(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        send(connection, Warned(str(message), category))

    warnings.showwarning = warned
    run(config, connection, ready, partial(os._exit, 0))


def run(
    config: ServeConfig,
    connection: Connection,
    ready: Callable[[], None],
    gone: Callable[[], None],
) -> None:
    """Load the model, tell of it, and decode; a mistake in the settings is told in its place.

    ready, gone: see `Core`.
    """
    try:
        model, tokenizer, exit_layers = load_model(config)
        capacity, backbone = room(config.capacity, model), model.backbone
        with engines_of(model).lend(
            model,
            [LOOKUP, *exit_layers],  # any request may ask for it
            slots=config.slots,
            capacity=capacity,
            max_pending=config.max_pending,
            compile=config.compiled(),
        ) as engine:
            assert isinstance(engine, Engine)
            facts = Facts(
                backbone.model.name_or_path, backbone.config.vocab_size, backbone.num_layers,
                exit_layers, sorted(end_tokens(backbone.model, tokenizer)), capacity,
                model.calibration,
            )  # fmt: skip
            send(connection, facts)
            Core(engine, model, connection, ready, gone).run()
    except UserError as error:
        send(connection, error)


def load_model(
    config: ServeConfig,
) -> tuple[Network, PreTrainedTokenizerBase, Sequence[int]]:
    """The model, its tokenizer, and where its exits are."""
    device = pick_device(config.device)
    share = Share(dtype=pick_dtype(config.precision, device), device=str(device))
    trust, layers = config.trust_remote_code, list[int]()
    if config.exits:
        model = load(Saved(config.exits, config.model or None, trust), share, Network)
        layers = [*active_layers(model, None), *([DRAFT] if model.draft else [])]
    else:
        # A network has an exit: this one has no weights, and is not used.
        none = ExitConfig("1/1", "embedding", head="shared")
        model = load(New(config.model, none, trust), share, Network)
    return model.eval(), tokenizer_of(model, config.exits, trust), layers


def room(capacity: int, model: Network) -> int:
    """Tokens that a text may have with its prompt.

    Raises:
        UserError: more than the backbone was made for.
    """
    longest = model.backbone.longest_text
    if not capacity:
        return min(CAPACITY, longest or CAPACITY)
    if longest and capacity > longest:
        raise UserError(
            f"capacity is {capacity}, the backbone's context {longest}: give that or less"
        )
    return capacity
