"""Which exits a model gets, and how people write layers and thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Literal, get_args

from ee_tuning.errors import UserError

Arch = Literal["embedding", "norm", "mlp", "layer", "draft", "eagle3"]
Init = Literal["copy", "random", "fitted"]
Head = Literal["own", "shared", "auto"]
Layers = str | int | list[int | str]
ARCHS: tuple[str, ...] = get_args(Arch)
HEADS: tuple[str, ...] = get_args(Head)
DRAFT = 0  # the layer's number of a draft exit, which sits at none
LOOKUP = -1  # in place of a layer: a token was looked up in its own text
DRAFTS = ("draft", "eagle3")  # the architectures of draft exits


@dataclass(frozen=True)
class ExitSpec:
    """One exit: after which layer it sits (counted from 1) and what it is made of.

    sources: of a draft exit, which sits at layer `DRAFT`, the layers whose states it reads.
    """

    layer: int
    arch: str
    head: str
    sources: tuple[int, ...] = ()

    def end(self, num_layers: int) -> int:
        """The last layer that is in memory for it: a draft exit follows passes to the end."""
        return self.layer if self.layer != DRAFT else num_layers

    def is_in(self, stage: range, num_layers: int) -> bool:
        """Whether the process that has the layers of `stage`, counted from 0, has this exit.

        A draft exit is where the last layer is.
        """
        return self.end(num_layers) - 1 in stage


@dataclass
class ExitConfig:
    """Which exits a model gets.

    layers: exit layers counted from 1. Numbers, fractions of the depth (``"1/8"``),
        ``"every:4"``, or one string with commas between them. A draft exit's is 0, which need not
        be given where it is the only one.
    arch: one of `ARCHS` for all exits, or one per exit.
    init: ``copy`` from the backbone's own modules, or ``random``. ``fitted``: a copy that `tune`
        fits to its data before the first step; see `ee_tuning.tune.fitted`.
    head: ``own`` trainable head per exit or the backbone's frozen one, ``shared``; ``auto``: a
        draft exit shares, others have their own. One for all exits or one per exit.
    seed: seed of the random initialisation.
    sources: layers whose states a draft exit reads; default: a low, a middle and a high one, and
        of ``draft`` the last.
    """

    layers: Layers
    arch: str | list[str] = "mlp"
    init: str = "copy"
    head: str | list[str] = "auto"
    seed: int = 0
    sources: Layers | None = None

    def specs(self, num_layers: int) -> list[ExitSpec]:
        """The exits of a backbone with `num_layers` layers, in order of depth, a draft exit last.

        Raises:
            UserError: a layer outside 1..num_layers or given twice, an unknown
                architecture or head, lists of different lengths, or a draft exit that sits at a
                layer or reads one that is not there.
        """
        alone = drafts_alone(self.layers, self.arch)
        layers = parse_layers(DRAFT if alone else self.layers, num_layers, least=DRAFT)
        archs = _one_per_exit("arch", self.arch, ARCHS, len(layers))
        given = _one_per_exit("head", self.head, HEADS, len(layers))
        default = ["shared" if layer == DRAFT else "own" for layer in layers]
        heads = [a if a != "auto" else b for a, b in zip(given, default, strict=True)]
        if not isinstance(self.seed, Integral):
            raise UserError(f"seed {self.seed!r} is not possible: give a whole number")
        if self.init not in get_args(Init):
            raise UserError(f"init {self.init!r} is unknown: use copy or random, or fitted")
        if self.init == "fitted" and "eagle3" in archs:
            raise UserError(
                "init fitted is not for an eagle3 exit, whose map does not see the token: use copy"
            )
        for layer, arch in zip(layers, archs, strict=True):
            _check_draft(layer, arch)
        specs = [
            ExitSpec(*one, self._sources(one[1], num_layers) if one[0] == DRAFT else ())
            for one in zip(layers, archs, heads, strict=True)
        ]
        if self.sources and DRAFT not in layers:
            raise UserError(
                "draft_sources is for a draft exit, and there is none: add it with --layers 0,… "
                "--arch draft,…, or leave --draft-sources out"
            )
        return sorted(specs, key=lambda spec: depth_of(spec.layer))

    def _sources(self, arch: str, num_layers: int) -> tuple[int, ...]:
        """The layers that a draft exit reads, by depth."""
        if self.sources:
            return tuple(sorted(parse_layers(self.sources, num_layers, "source layer")))
        places = [num_layers // 10, num_layers // 2, 5 * num_layers // 6, num_layers]
        if arch == "eagle3":  # where engines look, if nothing says otherwise
            places = [min(2, num_layers), num_layers // 2, num_layers - 3]
        return tuple(sorted({max(1, layer) for layer in places}))


def drafts_alone(layers: Layers, arch: str | list[str]) -> bool:
    """Whether there is to be a draft exit alone, whose number need not be given."""
    return layers in ("", []) and (arch if isinstance(arch, str) else "".join(arch)) in DRAFTS


def depth_of(layer: int) -> float:
    """What exits are ordered by: a draft exit, which sits at no layer, is behind all others."""
    return math.inf if layer == DRAFT else layer


def exit_name(layer: int) -> str:
    """What people call the exit at a layer."""
    return {DRAFT: "draft", LOOKUP: "lookup"}.get(layer, str(layer))


def mean_depth(layers: Mapping[int, int]) -> float:
    """Layers per token, of the number of tokens that left at each: as drafts they took none."""
    total = sum(max(layer, 0) * number for layer, number in layers.items())
    return total / max(1, sum(layers.values()))


def _check_draft(layer: int, arch: str) -> None:
    """Refuse a draft exit at a layer, or another one at none.

    Raises:
        UserError: says where it is to be.
    """
    if (layer == DRAFT) == (arch in DRAFTS):
        return
    if layer == DRAFT:
        raise UserError(
            f"exit layer 0 is a draft exit's, and arch is {arch}: layers are counted from 1, and a "
            "draft exit is --layers 0 --arch draft"
        )
    raise UserError(
        f"a draft exit sits at no layer, and {layer} is given: its number is 0 (--layers 0, or "
        "--layers 0,8 --arch draft,mlp)"
    )


def parse_layers(
    layers: Layers, num_layers: int, what: str = "exit layer", least: int = 1
) -> list[int]:
    """Exit layers as numbers, from ``"8,16"``, ``[8, 16]``, ``"1/8,2/8"`` or ``"every:4"``.

    what: they are, for people. least: the smallest number that is one.

    Raises:
        UserError: one is not understood, does not exist or is given twice; or there are none.
    """
    given = layers.split(",") if isinstance(layers, str) else layers
    given = [] if given == [""] else given
    items = list(given) if isinstance(given, (list, tuple)) else [given]
    found = [layer for item in items for layer in _parse_layer(item, num_layers, what, least)]
    if not found:
        raise UserError(
            "no exit layers given: name some with --layers, for example 8,16 or every:4"
        )
    for layer in found:
        if not least <= layer <= num_layers:
            raise UserError(
                f"{what} {layer} does not exist: the backbone has layers 1 to {num_layers}"
            )
        if found.count(layer) > 1:
            raise UserError(f"{what} {layer} is given twice in {layers!r}")
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
            "each once (8:0.9,16:0.7; a draft exit's is 0)"
        ) from None


def threshold_text(thresholds: Mapping[int, float]) -> str:
    """``0.873``, or ``8:0.873 16:0.912`` of several exits."""
    values = {layer: f"{value:.5g}" for layer, value in thresholds.items()}
    if len(values) == 1:
        return next(iter(values.values()))
    return " ".join(f"{layer}:{value}" for layer, value in values.items())


def _parse_layer(item: int | str, num_layers: int, what: str, least: int) -> list[int]:
    text = str(item).strip()
    try:
        if text.startswith("every:"):
            step = int(text.removeprefix("every:"))
            if not 0 < step <= num_layers:
                raise ValueError("it names no layer")
            return list(range(step, num_layers + 1, step))
        if "/" in text:
            return [round(Fraction(text) * num_layers)]
        return [int(text)]
    except (ValueError, ZeroDivisionError):
        draft = "; a draft exit's is 0" if least == DRAFT else ""
        raise UserError(
            f"{what} {text!r} is not understood: give numbers (8,16{draft}), fractions of the "
            f"depth (1/4,1/2) or every:N with an N from 1 to {num_layers}"
        ) from None


def _one_per_exit(name: str, value: str | list[str], known: tuple[str, ...], n: int) -> list[str]:
    values = value.split(",") if isinstance(value, str) else value
    values = [*values] if isinstance(values, list | tuple) else [values]
    for v in values:
        if v not in known:
            raise UserError(f"{name} {v!r} is unknown: use one of {', '.join(known)}")
    if len(values) not in (1, n):
        raise UserError(f"{len(values)} values of {name}, exits: {n}; give one, or one per exit")
    return values * n if len(values) == 1 else values
