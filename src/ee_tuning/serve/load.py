"""From settings to what is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from ee_tuning.calibrate.audit import Audit
from ee_tuning.certificate import CALIBRATED
from ee_tuning.data.chats import with_template
from ee_tuning.decode.engine import Engine
from ee_tuning.decode.engines import engines_of
from ee_tuning.decode.load import tokenizer_of
from ee_tuning.decode.settings import active_layers
from ee_tuning.devices import pick_device, pick_dtype
from ee_tuning.errors import UserError
from ee_tuning.exit_config import DRAFT, LOOKUP, ExitConfig
from ee_tuning.model import Network
from ee_tuning.serve.app import Served
from ee_tuning.serve.config import ServeConfig
from ee_tuning.serve.metrics import Metrics
from ee_tuning.serve.reading import Reader
from ee_tuning.serve.worker import Worker
from ee_tuning.serve.writer import Log
from ee_tuning.settings import changed
from ee_tuning.share import New, Saved, Share, load

CAPACITY = 4096  # tokens of a text, where the backbone's context has room for them


@contextmanager
def served(
    config: ServeConfig, log: Log, ready: Callable[[], None] = lambda: None
) -> Iterator[Served]:
    """Inside, the model of these settings can be served; it is not warmed up yet.

    ready: called when it is.

    Raises:
        UserError: settings that make no sense, a model that cannot be had, or K/V that do not fit.
    """
    check_settings(config)
    model, tokenizer, exit_layers = load_model(config)
    capacity = room(config.capacity, model)
    leaving = config.leaving(threshold=config.threshold, lookup=config.lookup)
    reader = Reader(model, tokenizer, exit_layers, leaving, config.mode, capacity)
    reader.check_defaults()
    name = (config.exits or config.model).rstrip("/")
    with engines_of(model).lend(
        model,
        [LOOKUP, *exit_layers],  # any request may ask for it
        slots=config.slots,
        capacity=capacity,
        max_pending=config.max_pending,
        compile=config.compiled(),
    ) as engine:
        assert isinstance(engine, Engine)
        found = model.calibration
        audited = config.audit and found is not None and found.risk == "next-token"
        audit = Audit(model, config.audit) if audited else None
        metrics = Metrics(name, audit)
        worker = Worker(engine, config.max_queue, config.deadline, metrics, log, audit, ready)
        yield Served(name, model, reader, worker, [config.measure], config.lookup)


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
    tokenizer = tokenizer_of(model, config.exits, trust)
    return model.eval(), with_template(tokenizer, config.chat_template), layers


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
