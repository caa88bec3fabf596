"""Which exits a model gets, and how people write layers and thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from ee_tuning.errors import UserError

Arch = Literal["embedding", "norm", "mlp", "layer"]
Init = Literal["copy", "random"]
Head = Literal["own", "shared"]
Layers = str | int | list[int | str]
ARCHS: tuple[str, ...] = get_args(Arch)
HEADS: tuple[str, ...] = get_args(Head)


@dataclass(frozen=True)
class ExitSpec:
    """One exit: after which layer it sits (counted from 1) and what it is made of."""

    layer: int
    arch: str
    head: str


@dataclass
class ExitConfig:
    """Which exits a model gets.

    layers: exit layers counted from 1. Numbers, fractions of the depth (``"1/8"``),
        ``"every:4"``, or one string with commas between them.
    arch: one of `ARCHS` for all exits, or one per exit.
    init: ``copy`` from the backbone's own modules, or ``random``.
    head: ``own`` trainable head per exit or the backbone's frozen one, ``shared``;
        one for all exits or one per exit.
    seed: seed of the random initialisation.
    """

    layers: Layers
    arch: str | list[str] = "mlp"
    init: str = "copy"
    head: str | list[str] = "own"
    seed: int = 0

    def specs(self, num_layers: int) -> list[ExitSpec]:
        """The exits of a backbone with `num_layers` layers, in order of depth.

        Raises:
            UserError: a layer outside 1..num_layers or given twice, an unknown
                architecture or head, or lists of different lengths.
        """
        layers = parse_layers(self.layers, num_layers)
        archs = _one_per_exit("arch", self.arch, ARCHS, len(layers))
        heads = _one_per_exit("head", self.head, HEADS, len(layers))
        if self.init not in ("copy", "random"):
            raise UserError(f"init {self.init!r} is unknown: use copy or random")
        return sorted(map(ExitSpec, layers, archs, heads), key=lambda spec: spec.layer)


def parse_layers(layers: Layers, num_layers: int) -> list[int]:
    """Exit layers as numbers, from ``"8,16"``, ``[8, 16]``, ``"1/8,2/8"`` or ``"every:4"``."""
    given = layers.split(",") if isinstance(layers, str) else layers
    items = list(given) if isinstance(given, (list, tuple)) else [given]
    found = [layer for item in items for layer in _parse_layer(item, num_layers)]
    if not found:
        raise UserError(
            "no exit layers given: name some with --layers, for example 8,16 or every:4"
        )
    for layer in found:
        if not 1 <= layer <= num_layers:
            raise UserError(
                f"exit layer {layer} does not exist: the backbone has layers 1 to {num_layers}"
            )
        if found.count(layer) > 1:
            raise UserError(f"exit layer {layer} is given twice in {layers!r}")
    return found


def parse_threshold(threshold: str) -> float | dict[int, float]:
    """One threshold, or one per exit layer: ``"8:0.9,16:0.7"``."""
    try:
        if ":" not in threshold:
            return float(threshold)
        pairs = [item.split(":") for item in threshold.split(",")]
        found = {int(layer): float(value) for layer, value in pairs}
        if len(found) < len(pairs):
            raise ValueError("a layer twice")
        return found
    except ValueError:
        raise UserError(
            f"threshold {threshold!r} is not understood: give a number, or one per exit layer, "
            "each once (8:0.9,16:0.7)"
        ) from None


def _parse_layer(item: int | str, num_layers: int) -> list[int]:
    text = str(item).strip()
    try:
        if text.startswith("every:"):
            step = int(text.removeprefix("every:"))
            return list(range(step, num_layers + 1, step)) if step > 0 else [step]
        if "/" in text:
            return [round(Fraction(text) * num_layers)]
        return [int(text)]
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"exit layer {text!r} is not understood: give numbers (8,16), fractions of the "
            "depth (1/4,1/2) or every:N"
        ) from None


def _one_per_exit(name: str, value: str | list[str], known: tuple[str, ...], n: int) -> list[str]:
    values = value.split(",") if isinstance(value, str) else list(value)
    for v in values:
        if v not in known:
            raise UserError(f"{name} {v!r} is unknown: use one of {', '.join(known)}")
    if len(values) not in (1, n):
        raise UserError(f"{len(values)} values of {name} for {n} exits: give one, or one per exit")
    return values * n if len(values) == 1 else values
