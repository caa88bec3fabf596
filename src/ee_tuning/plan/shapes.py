"""The model of a run without its weights."""

from __future__ import annotations

from ee_tuning.config import TuneConfig
from ee_tuning.costs import Account, work
from ee_tuning.model import Network
from ee_tuning.share import shapes, source_of


def shapes_of(config: TuneConfig) -> Network:
    """The model that `config` tunes, on the meta device: nothing but shapes.

    Raises:
        UserError: no such backbone or exits, or exits that the backbone cannot have.
    """
    return shapes(source_of(config))


def account_of(model: Network, config: TuneConfig) -> Account:
    """What the parts of the model that `config` tunes weigh; see `ee_tuning.costs.work`."""
    return work(model, config.seq_length, config.known_tokens, config.draft_steps)
