"""Where a token may leave: what `generate`'s settings come down to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from ee_tuning.config import MEASURES, MODES, Layers, parse_layers, parse_threshold
from ee_tuning.errors import UserError

if TYPE_CHECKING:
    from ee_tuning.model import EarlyExitModel


@dataclass(frozen=True)
class Policy:
    """Where the tokens of a sequence may leave.

    end: the layer at which every token stops; final: by the final exit there, not by an exit.
    thresholds: of the active exits before it, by layer. measure: of confidence. max_pending:
    tokens that may have left since the last one that went to the end. verifies: what left is a
    draft, which the next token that goes to the end verifies.
    """

    end: int
    final: bool = True
    thresholds: Mapping[int, float] = field(default_factory=dict)
    measure: str = "probability"
    max_pending: int = 8
    verifies: bool = False

    def leaves(self, layer: int, confidence: float) -> bool:
        """Whether a token leaves at an active exit."""
        return confidence >= self.thresholds[layer]

    @property
    def exit_layers(self) -> list[int]:
        """Every layer at which a token may stop at an exit, by depth."""
        return [*self.thresholds, *([] if self.final else [self.end])]


def make_policy(
    model: EarlyExitModel,
    mode: str,
    threshold: str | float | Mapping[int, float] = 0.8,
    exit_layers: Layers | None = None,
    max_pending: int = 8,
    measure: str = "probability",
    min_depth: int = 0,
) -> Policy:
    """The policy of a mode; see `ee_tuning.decode.arguments.Settings` for the arguments.

    Raises:
        UserError: an unknown mode, measure or exit, or thresholds that are not those of the exits.
    """
    depth = model.backbone.num_layers
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    if measure not in MEASURES:
        raise UserError(f"measure {measure!r} is unknown: use one of {', '.join(MEASURES)}")
    check_pending(max_pending)
    if not isinstance(min_depth, int) or min_depth < 0:
        raise UserError(f"min_depth {min_depth!r} is not possible: give a layer's number")
    named = active_layers(model, exit_layers)
    active = [k for k in named if k >= min_depth]
    if not active and mode != "full":
        raise UserError(f"min_depth {min_depth} leaves no exit active, of those at {named}")
    if isinstance(threshold, str):
        threshold = parse_threshold(threshold)
    thresholds = _thresholds(threshold, active)
    if mode == "fixed":
        if len(active) != 1:
            raise UserError(
                f"mode fixed needs one exit, active are {active}: name it with exit_layers, and no "
                "min_depth above it"
            )
        return Policy(active[0], final=False, measure=measure, max_pending=max_pending)
    if mode == "speculative" and depth in active:
        raise UserError(
            f"mode speculative cannot draft with the exit at the last layer, {depth}: leave it "
            "out of exit_layers"
        )
    # At a threshold of 1 an exit is switched off: rounding may give a probability of 1.
    inner = {k: t for k, t in thresholds.items() if k < depth and t < 1 and mode != "full"}
    verifies = mode == "speculative" and bool(inner)
    return Policy(depth, True, inner, measure, max_pending, verifies)


def check_pending(max_pending: int) -> None:
    """Refuse a bound that is none.

    Raises:
        UserError: it is no whole number, or negative.
    """
    if not isinstance(max_pending, int) or max_pending < 0:
        raise UserError(f"max_pending {max_pending!r} is not possible: give a whole number from 0")


def active_layers(model: EarlyExitModel, exit_layers: Layers | None) -> list[int]:
    """The layers of the exits that `exit_layers` names, by depth; all, if it names none.

    Raises:
        UserError: there is no exit at one of them.
    """
    if exit_layers is None:
        return model.all_exit_layers
    layers = sorted(parse_layers(exit_layers, model.backbone.num_layers))
    for layer in layers:
        model.check_exit(layer)
    return layers


def _thresholds(threshold: float | Mapping[int, float], active: list[int]) -> dict[int, float]:
    """The threshold of every active exit.

    Raises:
        UserError: one is outside [0, 1], is for no active exit, or an exit has none.
    """
    try:
        given: dict[Any, Any] = (
            {int(layer): value for layer, value in threshold.items()}
            if isinstance(threshold, Mapping)
            else dict.fromkeys(active, threshold)
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"the thresholds' layers must be numbers: {error}") from error
    for value in given.values() if active or isinstance(threshold, Mapping) else [threshold]:
        if not (isinstance(value, Real) and 0 <= float(value) <= 1):
            raise UserError(f"threshold {value!r} is outside [0, 1]")
    unknown, missing = sorted(given.keys() - set(active)), sorted(set(active) - given.keys())
    if unknown:
        raise UserError(
            f"threshold for layer {unknown[0]}, where no exit is active, but at {active}: leave it "
            "out, or see exit_layers and min_depth"
        )
    if missing:
        raise UserError(f"no threshold for the exit at layer {missing[0]}: give one for each")
    return {layer: given[layer] for layer in active}
