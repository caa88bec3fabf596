"""The engines of a model: which one fits a call, and whose turn it is.

They are kept beside the model, not on it, and no longer than it is: a model can be copied, pickled
and handed to another process whether or not it has generated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ee_tuning.backbone import check_merged
from ee_tuning.decode.ahead import cuts_beside
from ee_tuning.decode.engine import Engine
from ee_tuning.decode.sequences import Request
from ee_tuning.decode.stage import Stage
from ee_tuning.errors import UserError
from ee_tuning.fingerprint import states_of
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import Mesh

# Room of an engine is a multiple of this, so that texts of about the same length share one.
ROOM = 256
KEPT = 4  # engines of a model: one for each way to decode that is used in turns

AnyEngine = Engine | Stage


class Engines:
    """The engines that one model keeps, the last used ones last.

    mesh: of the processes that decode together. turn: held by the thread whose engine runs, since
    all share the model's modules and the device.
    """

    def __init__(self) -> None:
        self.mesh = Mesh()
        self.turn = threading.RLock()
        self.kept: dict[Any, AnyEngine] = {}
        self._lent: list[AnyEngine] = []

    @contextmanager
    def lend(self, model: Network, exit_layers: Sequence[int], **size: Any) -> Iterator[AnyEngine]:
        """An engine, see `fitting`, that nobody else is given meanwhile."""
        with self.turn:
            engine = self.fitting(model, exit_layers, **size)
            self._lent.append(engine)
        try:
            yield engine
        finally:
            with self.turn:
                self._lent.remove(engine)

    def clear(self) -> None:
        """Free them, and the memory of their K/V; those in use are freed when they are done."""
        with self.turn:
            self.kept.clear()

    def fitting(
        self,
        model: Network,
        exit_layers: Sequence[int],
        *,
        slots: int,
        capacity: int,
        max_pending: int,
        compile: bool | None,
        drafts: bool = False,
    ) -> AnyEngine:
        """The smallest engine that is free and has room; else a new one, which is kept.

        Captured graphs hold the addresses of weights, and a CPU has copies: other weights want
        another engine.
        drafts: of requests some have drafts that the end verifies: stages then work in turns, which
        whole texts want, too, and no exit is asked beside layers.

        Raises:
            UserError: senseless numbers, K/V that do not fit into memory, or an adapter of PEFT.
        """
        for name, number in (("slots", slots), ("capacity", capacity)):
            if not isinstance(number, int) or number < 1:
                raise UserError(f"{name} is {number!r}: give a whole number from 1")
        backbone, compile = model.backbone, self.will_compile(model, compile)
        if backbone.end and capacity > backbone.end:
            raise UserError(
                f"{capacity} tokens with the prompt are asked for, the backbone's positions go on "
                f"for {backbone.end} alone: ask for fewer"
            )
        # Others are cut alike for both.
        drafts = drafts and (self.mesh.pp > 1 or bool(cuts_beside(model, exit_layers)))
        long = backbone.is_long(capacity)
        kind = tuple(exit_layers), max_pending, compile, drafts, long
        alike = (*kind, *_state_of(model))
        kept = [key for key in self.kept if key[0] == alike]
        fitting = [
            key for key in kept
            if key[1] >= slots and key[2] >= capacity and self.kept[key] not in self._lent
        ]  # fmt: skip
        if fitting:
            key = min(fitting, key=lambda one: one[1] * one[2])
            engine = self.kept.pop(key)
        else:
            room = -(-capacity // ROOM) * ROOM
            longest = backbone.context if long else backbone.longest_text
            if longest and capacity <= longest < room:
                room = longest
            for smaller in [one for one in kept if one[1] <= slots and one[2] <= room]:
                del self.kept[smaller]
            engine = self._make(
                model, exit_layers, slots=slots, capacity=room, max_pending=max_pending,
                compile=compile, drafts=drafts,
            )  # fmt: skip
            # An engine may lay weights elsewhere in memory.
            key = (*kind, *_state_of(model)), slots, room
        self.kept[key] = engine
        for oldest in list(self.kept)[:-KEPT]:
            del self.kept[oldest]
        return engine

    def _make(
        self, model: Network, exit_layers: Sequence[int], *, drafts: bool, **settings: Any
    ) -> AnyEngine:
        """A new engine; where there is no room, in the place of all that are kept."""
        check_merged(model.model)
        stages = self.mesh if self.mesh.pp > 1 else None

        def make() -> AnyEngine:
            if stages is not None and not drafts:
                return Stage(model, exit_layers, mesh=stages, **settings)
            return Engine(
                model, exit_layers, drafts=drafts, **settings, turn=self.turn, mesh=stages
            )

        # What it writes to has to be writable by later calls outside of inference mode, too.
        with torch.inference_mode(False):
            try:
                return self.mesh.on_all(make)
            except UserError:
                self.kept.clear()
                return self.mesh.on_all(make)

    def will_compile(self, model: Network, compile: bool | None) -> bool:
        """Whether decoding with this argument compiles.

        Raises:
            UserError: it cannot.
        """
        if not isinstance(compile, bool | None):
            raise UserError(f"compile is True, False or None, not {compile!r}")
        if compile is None:
            return model.backbone.device.type == "cuda"
        return compile


_ENGINES: WeakKeyDictionary[Network, Engines] = WeakKeyDictionary()
_LOCK = threading.Lock()


def engines_of(model: Network) -> Engines:
    """The engines of a model, which hold nothing of it that would keep it alive."""
    with _LOCK:
        return _ENGINES.setdefault(model, Engines())


@contextmanager
def engine_for(
    model: Network, requests: Sequence[Request], compile: bool | None
) -> Iterator[AnyEngine]:
    """An engine in which all of `requests` have a slot, and that nobody else is given meanwhile.

    Raises:
        UserError: see `Engines.fitting`; or texts whose rotary frequencies cannot be had together.
    """
    policies = [request.policy for request in requests]
    exits = sorted({layer for policy in policies for layer in policy.exit_layers})
    pending = max(policy.max_pending for policy in policies)
    capacity = max(request.max_length for request in requests)
    backbone, original = model.backbone, model.backbone.original_context
    if backbone.is_long(capacity):
        long = [backbone.is_long(len(request.ids)) for request in requests]
        if not any(long):
            raise UserError(
                f"{capacity} tokens with the prompt are asked for, and a text that begins with "
                f"up to {original} ends there, where rotary frequencies change: ask for fewer"
            )
        if not all(long):
            raise UserError(
                f"prompts of up to {original} tokens and longer ones have other rotary "
                "frequencies: give them in calls of their own"
            )
    size = {"slots": len(requests), "capacity": capacity, "max_pending": pending}
    size |= {"drafts": any(policy.verifies for policy in policies)}
    with engines_of(model).lend(model, exits, **size, compile=compile) as engine:
        yield engine


def _state_of(model: Network) -> tuple[Any, Any]:
    """What an engine depends on that may change under a model: its weights, and autocast."""
    device = model.backbone.device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    # Weights may be changed where they are, and a CPU has copies in another order.
    return states_of(model), cast
