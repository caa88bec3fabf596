"""Where a token may leave: what the settings `Leaving` come down to, a class for each mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

from ee_tuning.config import MEASURES, Leaving
from ee_tuning.decode.certified import with_certified
from ee_tuning.errors import UserError
from ee_tuning.exit_config import DRAFT, LOOKUP, Layers, parse_layers, parse_threshold
from ee_tuning.model import Network
from ee_tuning.passes.wanted import Prediction
from ee_tuning.settings import changed


@dataclass
class Policy:
    """Where the tokens of a sequence may leave; a subclass for each mode.

    end: the layer at which every token stops. thresholds: of the active exits before it, by layer.
    measure: of confidence. max_pending: tokens that may have left since the last one that went to
    the end. bar: where a draft exit drafts, what its confidences multiplied must not fall below.
    lookup: the text itself may draft, too.
    """

    end: int
    thresholds: Mapping[int, float] = field(default_factory=dict)
    measure: str = Leaving.measure
    max_pending: int = Leaving.max_pending
    bar: float | None = None
    lookup: bool = False

    mode: ClassVar[str]
    ignores: ClassVar[tuple[str, ...]] = ()  # settings that change neither tokens nor layers
    needs_exits: ClassVar[bool] = True
    final: ClassVar[bool] = True  # the final exit predicts at the end, not an exit there
    verifies: ClassVar[bool] = False  # what left is a draft; the next that gets to the end verifies
    steady: ClassVar[bool] = False  # drafts are as many as may leave, whether that pays or not

    @classmethod
    def read(cls, leaving: Leaving, thresholds: Mapping[int, float], depth: int) -> Policy:
        """The policy of this mode, with `thresholds` of all active exits.

        Raises:
            UserError: the mode cannot do with these exits.
        """
        # At a threshold of 1 an exit is switched off: rounding may give a probability of 1.
        inner = {k: t for k, t in thresholds.items() if k < depth and t < 1}
        return cls(depth, inner, leaving.measure, leaving.max_pending)

    def start(self) -> Policy:
        """The policy of one sequence: one that keeps something about it gives a fresh one."""
        return self

    def leaves(self, layer: int, found: Prediction, ids: Sequence[int]) -> bool:
        """Whether the token that follows `ids` leaves at an active exit that predicts `found`."""
        return found.confidence >= self.thresholds[layer]

    @property
    def exit_layers(self) -> list[int]:
        """Every layer at which a token may stop at an exit, by depth; first, where there are such
        drafts, `LOOKUP` and a draft exit's."""
        text, draft = [LOOKUP] * self.lookup, [] if self.bar is None else [DRAFT]
        return [*text, *draft, *self.thresholds, *([] if self.final else [self.end])]


class Full(Policy):
    """Every token goes through the whole backbone."""

    mode = "full"
    ignores = ("threshold", "exit_layers", "min_depth", "max_pending", "measure")
    needs_exits = False

    @classmethod
    def read(cls, leaving: Leaving, thresholds: Mapping[int, float], depth: int) -> Policy:
        """As of any mode, without exits."""
        return super().read(leaving, {}, depth)


class Fixed(Policy):
    """Every token ends at the same exit."""

    mode = "fixed"
    ignores = ("threshold", "max_pending", "measure")
    final = False

    @classmethod
    def read(cls, leaving: Leaving, thresholds: Mapping[int, float], depth: int) -> Policy:
        """The one active exit's."""
        if len(thresholds) != 1:
            raise UserError(
                f"mode fixed needs one exit, active are {list(thresholds)}: name it with "
                "exit_layers, and no min_depth above it"
            )
        return super().read(leaving, {}, *thresholds)


class Threshold(Policy):
    """A token leaves at the first exit that is sure enough."""

    mode = "threshold"


class Speculative(Policy):
    """What leaves at an exit is a draft, which the end verifies."""

    mode = "speculative"
    verifies = True

    @classmethod
    def read(cls, leaving: Leaving, thresholds: Mapping[int, float], depth: int) -> Policy:
        """Of exits before the last layer, or of the text; of neither, there are no drafts."""
        if depth in thresholds:
            raise UserError(
                f"mode speculative cannot draft with the exit at the last layer, {depth}: leave "
                "it out of exit_layers"
            )
        layers = {layer: bar for layer, bar in thresholds.items() if layer != DRAFT}
        policy = super().read(leaving, layers, depth)
        if thresholds.get(DRAFT, 1) < 1:
            policy.bar = thresholds[DRAFT]
        policy.lookup = leaving.lookup
        return policy if policy.exit_layers else Full.read(leaving, {}, depth)


class Audited(Speculative):
    """As `Threshold` leaves: a text at full depth, of which each draft is a token that would have
    left, and each that is rejected one that would have been another. See `ee_tuning.calibrate`."""

    steady = True


POLICIES = {kind.mode: kind for kind in (Full, Fixed, Threshold, Speculative)}


def make_policy(model: Network, leaving: Leaving) -> Policy:
    """What these settings come to for a model.

    Raises:
        UserError: an unknown mode, measure or exit, or thresholds that are not those of the exits.
    """
    check_mode(leaving)
    leaving = with_certified(model, leaving)
    mode, measure, least = leaving.mode, leaving.measure, leaving.min_depth
    if measure not in MEASURES:
        raise UserError(f"measure {measure!r} is unknown: use one of {', '.join(MEASURES)}")
    check_pending(leaving.max_pending)
    if not isinstance(least, int) or least < 0:
        raise UserError(f"min_depth {least!r} is not possible: give a layer's number")
    named = active_layers(model, leaving.exit_layers, POLICIES[mode].verifies)
    if leaving.lookup and not leaving.exit_layers:
        named = [layer for layer in named if layer < model.backbone.num_layers]
    active = [k for k in named if k >= least or k == DRAFT]
    needs_exits = POLICIES[mode].needs_exits and not leaving.lookup
    if not named and needs_exits:
        raise UserError(
            f"mode {mode} needs an exit at a layer, and there is a draft exit alone, which serves "
            "mode speculative only"
        )
    if not active and needs_exits:
        raise UserError(f"min_depth {least} leaves no exit active, of those at {named}")
    thresholds = _thresholds(leaving.threshold, active)
    return POLICIES[mode].read(leaving, thresholds, model.backbone.num_layers)


def ignored(leaving: Leaving) -> str:
    """What to say of settings that are not as by default, and that the mode ignores, if any."""
    given = changed(leaving, POLICIES[leaving.mode].ignores)
    return f"mode {leaving.mode} ignores {' and '.join(given)}" if given else ""


def check_mode(leaving: Leaving) -> None:
    """Refuse a mode that is none, and drafts from the text where nothing verifies them.

    Raises:
        UserError: says which modes there are.
    """
    mode, lookup = leaving.mode, leaving.lookup
    if mode not in POLICIES:
        raise UserError(f"mode {mode!r} is unknown: use one of {', '.join(POLICIES)}")
    if not isinstance(lookup, bool):
        raise UserError(f"lookup {lookup!r} is not possible: give True or False")
    if lookup and not POLICIES[mode].verifies:
        raise UserError(
            f"lookup is not possible with mode {mode}, which verifies no drafts: use mode "
            "speculative, with threshold 1 for drafts from the text alone"
        )


def check_pending(max_pending: int) -> None:
    """Refuse a bound that is none.

    Raises:
        UserError: it is no whole number, or lets no token leave.
    """
    if not isinstance(max_pending, int) or max_pending < 1:
        raise UserError(
            f"max_pending {max_pending!r} is not possible: give a whole number from 1, or use mode "
            "full, in which no token leaves"
        )


def active_layers(model: Network, exit_layers: Layers | None, drafts: bool = False) -> list[int]:
    """The layers of the exits that `exit_layers` names, by depth; all, if it names none.

    drafts: a draft exit may be among them, which is then the only one: if none is named, it is
    taken where there is one.

    Raises:
        UserError: there is no exit at one of them, or a draft exit is named that cannot be had.
    """
    if exit_layers is None or exit_layers == "":
        if drafts and DRAFT in model.all_exit_layers:
            return [DRAFT]
        return [layer for layer in model.all_exit_layers if layer != DRAFT]
    layers = sorted(parse_layers(exit_layers, model.backbone.num_layers, least=DRAFT))
    for layer in layers:
        model.check_exit(layer)
    if DRAFT in layers and not drafts:
        raise UserError(
            "exit layer 0 is the draft exit, at which no token leaves: it serves --mode "
            "speculative alone; leave it out of exit_layers"
        )
    if DRAFT in layers and len(layers) > 1:
        raise UserError(
            f"the draft exit drafts alone, and exit_layers names {layers}: name 0, or the others"
        )
    return layers


def check_threshold(value: Any) -> None:
    """Refuse what no confidence can be held against.

    Raises:
        UserError: it is no number, or one outside [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(
            f"threshold {value!r} is no number: give one from 0 to 1, or one per exit layer, as "
            "{8: 0.9, 16: 0.7}"
        )
    if not 0 <= float(value) <= 1:
        raise UserError(f"threshold {value} is outside [0, 1]: give a number from 0 to 1")


def _thresholds(
    threshold: str | float | Mapping[int, float], active: list[int]
) -> dict[int, float]:
    """The threshold of every active exit.

    Raises:
        UserError: one is no number within [0, 1], is for no active exit, or an exit has none.
    """
    if isinstance(threshold, str):
        threshold = parse_threshold(threshold)
    given: dict[Any, Any] = (
        dict(threshold) if isinstance(threshold, Mapping) else dict.fromkeys(active, threshold)
    )
    try:
        given = {int(layer): value for layer, value in given.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"the thresholds' layers must be numbers, not {[*given]}") from error
    for value in given.values() if active or isinstance(threshold, Mapping) else [threshold]:
        check_threshold(value)
    unknown, missing = sorted(given.keys() - set(active)), sorted(set(active) - given.keys())
    if unknown:
        raise UserError(
            f"threshold for layer {unknown[0]}, where no exit is active, but at {active}: leave it "
            "out, or see exit_layers and min_depth"
        )
    if missing:
        raise UserError(f"no threshold for the exit at layer {missing[0]}: give one for each")
    return {layer: given[layer] for layer in active}
