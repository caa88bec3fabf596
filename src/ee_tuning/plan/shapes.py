"""The model of a run without its weights."""

from __future__ import annotations

import dataclasses

import torch

from ee_tuning.config import ExitConfig, TuneConfig
from ee_tuning.costs import Account, work
from ee_tuning.loading import empty_backbone
from ee_tuning.model import EarlyExitModel, base_of, find_exits, read_exit_config, saved_exits
from ee_tuning.vocabulary import Vocabulary


def shapes_of(config: TuneConfig) -> EarlyExitModel:
    """The model that `config` tunes, on the meta device: nothing but shapes.

    Raises:
        UserError: no such backbone or exits, or exits that the backbone cannot have.
    """
    exits: ExitConfig = config.exit_config()
    path, known = config.model, None
    if config.exits:
        folder = find_exits(config.exits)
        saved = read_exit_config(folder)
        exits, path = saved_exits(saved), base_of(folder, saved, config.model)
        known = saved.get("vocab_size")
    model = EarlyExitModel(empty_backbone(path), dataclasses.replace(exits, init="copy"))
    if known:  # which tokens does not matter; heads stay whole, costs count what is left of them
        model.vocabulary = Vocabulary(torch.arange(known), model.backbone.config.vocab_size)
    return model


def account_of(model: EarlyExitModel, config: TuneConfig) -> Account:
    """What the parts of the model that `config` tunes weigh; see `ee_tuning.costs.work`."""
    return work(model, config.seq_length, config.exit_vocab)
