"""CUDA graphs acted out on a CPU: what a captured piece reads, and when that is there.

A capture executes nothing: what a piece made has no numbers until the graph runs, and graphs run on
the very tensors of the capture. What earlier runs of the same piece made is gone by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Keeps every operation with its tensors, and which of its results are memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host is asked"
        found = func(*args, **kwargs)
        given = {_memory(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        fresh = [one if _memory(one) not in given else None for one in _tensors(found)]
        self.operations.append((func, args, kwargs, fresh))
        return found

    def spoil(self) -> None:
        """Nothing that was made is there any more."""
        for *_, fresh in self.operations:
            for one in fresh:
                if one is not None and one.is_floating_point():
                    one.fill_(torch.nan)
                elif one is not None and one.dtype != torch.bool:
                    one.fill_(torch.iinfo(one.dtype).max)  # as an index an error


class Recorded:
    """In place of a captured piece."""

    def __init__(self, function: Callable[[], Any], begin: Callable[[], Any]) -> None:
        before = Recorder()
        for _ in range(2):
            begin()
            with before:
                function()
        self._capture = Recorder()
        with self._capture:
            function()
        self._capture.spoil()
        before.spoil()

    def replay(self) -> None:
        """Run it."""
        for func, args, kwargs, fresh in self._capture.operations:
            for one, found in zip(fresh, _tensors(func(*args, **kwargs)), strict=True):
                if one is not None:
                    one.copy_(found)


class Acted:
    """In place of `Branches`, of recorded pieces."""

    def __init__(
        self,
        steps: Sequence[Sequence[Recorded]],
        goes_on: Tensor,
        last: Recorded | None = None,
        ends: int = 0,
    ) -> None:
        self._steps, self._goes_on, self._last, self._ends = steps, goes_on, last, ends

    def __call__(self) -> None:
        self._steps[0][0].replay()
        least = 1
        for step in self._steps[1:]:
            variant = self._goes_on.item()
            if variant not in range(least, len(step) + 1):
                break
            least = int(variant)
            step[least - 1].replay()
            if least == self._ends:
                break
        if self._last is not None:
            self._last.replay()


def act_out(graphs: Any, monkeypatch: Any) -> None:
    """Let `Graphs` of a CPU have branches that are acted out."""
    monkeypatch.setattr("ee_tuning.passes.graphs.Branches", Acted)
    monkeypatch.setattr("ee_tuning.invariant.attention._on_cpu", attend)
    monkeypatch.setattr(graphs, "_on_gpu", True)
    monkeypatch.setattr(graphs, "_graph", lambda piece, begin, keep: (Recorded(piece, begin), 0))


def attend(kept: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention that asks tensors alone where tokens are; sees what the kernel on CUDA loads."""
    place, shared = kept.place, query.shape[1] // key.shape[1]
    keys, values = (x[place.slots].repeat_interleave(shared, 1) for x in (key, value))
    index = torch.arange(key.shape[2])
    seen = index <= place.positions[:, None, :, None]
    loaded = (index <= place.positions[:, -1:])[:, None, :, None]
    scores = (query @ keys.transpose(2, 3)).float() * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype)
    return (weights @ values.masked_fill(~loaded, 0)).transpose(1, 2)


def _tensors(found: Any) -> list[Tensor]:
    return [one for one in tree_leaves(found) if isinstance(one, Tensor)]


def _memory(one: Tensor) -> int:
    return id(one) if one.layout != torch.strided else one.untyped_storage()._cdata
