"""What the threshold ``calibrated`` comes to: that of the model's certificate, while it holds."""

from __future__ import annotations

import warnings
from dataclasses import replace

from ee_tuning.adapter import changed_exits
from ee_tuning.certificate import CALIBRATED, Certificate, changed
from ee_tuning.config import Leaving
from ee_tuning.errors import Notice, UserError
from ee_tuning.exit_config import parse_layers
from ee_tuning.fingerprint import PART, backbone_hashes
from ee_tuning.model import Network

MODES = ("threshold", "speculative")


def with_certified(model: Network, leaving: Leaving) -> Leaving:
    """`leaving`, with the calibrated thresholds and settings if it asks for these.

    Where the certificate does not hold any more, there is a `Notice`, and tokens go to full depth.

    Raises:
        UserError: the exits were not calibrated, or other exits are to be active.
    """
    if leaving.threshold != CALIBRATED:
        return leaving
    found = model.calibration
    if found is None:
        raise UserError(
            "the exits were not calibrated: run ee-tuning calibrate, or give a threshold"
        )
    if leaving.mode not in MODES:
        raise UserError(
            f"calibrated thresholds are for mode {' and '.join(MODES)}, not {leaving.mode}"
        )
    _check_layers(model, leaving, found)
    reason = _changed(model, leaving, found)
    if reason:
        warn_void(reason)
        # Other prompts of a batch may have begun before, with an engine for `max_pending` tokens.
        bound = found.max_pending
        return replace(
            leaving, mode="full", threshold=1.0, exit_layers="", min_depth=0, max_pending=bound
        )
    return replace(
        leaving,
        threshold=dict(found.thresholds),
        exit_layers=found.exit_layers,
        measure=found.measure,
        max_pending=found.max_pending,
        min_depth=0,
    )


def holds_for(model: Network, scores: bool, new_tokens: int) -> bool:
    """Whether the certificate holds for such texts; if not, there is a `Notice`.

    scores: there is more to the choice of a token than the likeliest one. Of texts longer than
    those that were calibrated it is said that nothing is known.
    """
    found = model.calibration
    assert found is not None
    if scores:
        warn_void("it is of greedy texts, without processors of logits")
    elif new_tokens > found.max_new_tokens:
        warnings.warn(
            f"the calibration is of texts of up to {found.max_new_tokens} new tokens: it does not "
            "say what happens behind these",
            Notice,
            stacklevel=3,
        )
    return not scores


def warn_void(reason: str) -> None:
    """Say that the calibration does not hold."""
    warnings.warn(
        f"the calibration does not hold: {reason}; tokens go to full depth",
        Notice,
        stacklevel=3,
    )


def _check_layers(model: Network, leaving: Leaving, found: Certificate) -> None:
    there = {*model.all_exit_layers}
    if not {*found.exit_layers} <= there:
        raise UserError(
            f"the calibration is of exits at {found.exit_layers}, and the exits are at "
            f"{sorted(there)}: calibrate these"
        )
    given = leaving.exit_layers
    named = {*parse_layers(given, model.backbone.num_layers, least=0)} if given else {*found.exits}
    named = {layer for layer in named if layer >= leaving.min_depth}
    if named != {*found.exits}:
        raise UserError(
            f"the calibration is of exits at {found.exit_layers}, and {sorted(named)} are to be "
            "active: leave exit_layers and min_depth out, or calibrate those"
        )


def _changed(model: Network, leaving: Leaving, found: Certificate) -> str:
    """Why a certificate does not hold, if so: a setting that was given otherwise, or weights."""
    for name in ("measure", "max_pending"):
        given, then = getattr(leaving, name), getattr(found, name)
        if given not in (then, getattr(Leaving, name)):
            return f"it is of {name} {then}, now {given} (leave {name} out, or calibrate again)"
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype != found.dtype:
        advice = f"(load it in {found.dtype}, or calibrate again)"
        return f"it is of {found.dtype}, and the model is in {dtype} {advice}"
    others = changed_exits(model, found)
    read, now = model.exits_read, backbone_hashes(model.backbone)
    there = None if read is None else (read.backbone, read.backbone)
    others += changed(PART, now, found.backbone, there)
    return f"the {others[0]} is another one now (calibrate again)" if others else ""
