"""One CUDA graph of several captured pieces, each of which says which one runs next, if any.

A next piece is a body of a conditional node (CUDA 12.8), so the host is not asked. torch has no
call for such nodes; the driver is called through NVIDIA's bindings, which come with torch.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from cuda.bindings import driver
except ImportError:
    driver = None

LEAST = 12080  # CUDA, of the driver and of the bindings
# Sets a condition to the number at an address less another one. In PTX, since the function that it
# calls has no address on the host, and a compiler for CUDA need not be there.
SET_CONDITION = b"""
.version 7.0
.target sm_60
.address_size 64
.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);
.visible .entry set_condition(.param .u64 address, .param .u64 handle, .param .f64 least)
{
    .reg .b32 %value;
    .reg .b64 %address, %handle;
    .reg .f64 %given, %least;
    ld.param.u64 %address, [address];
    ld.param.u64 %handle, [handle];
    ld.param.f64 %least, [least];
    cvta.to.global.u64 %address, %address;
    ld.global.f64 %given, [%address];
    sub.f64 %given, %given, %least;
    cvt.rzi.s32.f64 %value, %given;
    {
        .param .b64 first;
        .param .b32 second;
        st.param.b64 [first], %handle;
        st.param.b32 [second], %value;
        call.uni cudaGraphSetConditional, (first, second);
    }
    ret;
}
\0"""


def can_branch() -> bool:
    """Whether the current device's graphs can have branches."""
    if driver is None or not torch.cuda.is_available() or not torch.version.cuda:
        return False
    return min(driver.CUDA_VERSION, _checked(driver.cuDriverGetVersion())) >= LEAST


class Branches:
    """Steps in one graph, each with a variant that `goes_on` tells, and what is `last` behind them.

    Raises:
        RuntimeError: the driver refuses.
    """

    def __init__(
        self,
        steps: Sequence[Sequence[torch.cuda.CUDAGraph]],
        goes_on: Tensor,
        last: torch.cuda.CUDAGraph | None = None,
        ends: int = 0,
    ) -> None:
        """As of `Graphs.branched`; steps, of one variant or two each, and `last` are captured, with
        their graphs kept. They keep the memory they work in."""
        self._steps, self._last, self._goes_on, self._ends = steps, last, goes_on, ends
        self._module = _checked(driver.cuModuleLoadData(SET_CONDITION))
        graph = self._graph = _checked(driver.cuGraphCreate(0))
        top = self._add(graph, _child(graph, None, steps[0][0]), 1, 0)
        if last is not None:
            _child(graph, top, last)
        self._run = _checked(driver.cuGraphInstantiate(graph, 0))
        weakref.finalize(self, _destroy, self._run, graph, self._module).atexit = False

    def _add(self, inner: Any, node: Any, number: int, least: int) -> Any:
        """Step `number` and those behind it, of variants from `least` on, behind `node` of `inner`,
        a part of the graph; gives the last node there."""
        if number == len(self._steps):
            return node
        pieces = self._steps[number][least:]
        context = _checked(driver.cuCtxGetCurrent())
        handle = _checked(driver.cuGraphConditionalHandleCreate(self._graph, context, 0, 0))
        node = self._tell(inner, node, handle, least + 1)
        node, bodies = self._branch(inner, node, handle, len(pieces))
        for variant, (body, piece) in enumerate(zip(bodies, pieces, strict=True), least):
            inside = _child(body, None, piece)
            if variant + 1 != self._ends:
                self._add(body, inside, number + 1, variant)
        return node

    def _tell(self, inner: Any, node: Any, handle: Any, least: int) -> Any:
        """What sets a condition to `goes_on` less a number, behind a node."""
        setter = driver.CUDA_KERNEL_NODE_PARAMS()
        setter.func = _checked(driver.cuModuleGetFunction(self._module, b"set_condition"))
        for size in ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ"):
            setattr(setter, size, 1)
        values = self._goes_on.data_ptr(), int(handle), float(least)
        kinds = ctypes.c_void_p, ctypes.c_ulonglong, ctypes.c_double
        setter.kernelParams = values, kinds
        return _checked(driver.cuGraphAddKernelNode(inner, [node], 1, setter))

    def _branch(self, inner: Any, node: Any, handle: Any, number: int) -> tuple[Any, list[Any]]:
        """A condition behind a node: its own node, and so many bodies, of which that one runs which
        it counts from 0; none, if there is none."""
        branch = driver.CUgraphNodeParams()
        branch.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        branch.conditional.handle = handle
        branch.conditional.ctx = _checked(driver.cuCtxGetCurrent())
        branch.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_SWITCH
        branch.conditional.size = number
        edges = [None] if driver.CUDA_VERSION >= 13000 else []  # kinds of edges: the usual one
        node = _checked(driver.cuGraphAddNode(inner, [node], *edges, 1, branch))
        return node, branch.conditional.phGraph_out

    def __call__(self) -> None:
        """Run on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        _checked(driver.cuGraphLaunch(self._run, stream))


def _child(graph: Any, before: Any, piece: torch.cuda.CUDAGraph) -> Any:
    """A piece as a node of a graph, behind another one."""
    behind = None if before is None else [before]
    child = driver.CUgraph(piece.raw_cuda_graph())
    return _checked(driver.cuGraphAddChildGraphNode(graph, behind, int(bool(behind)), child))


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver gives."""
    error, *found = result
    if int(error) != 0:
        raise RuntimeError(f"a CUDA graph with branches cannot be had: {error.name}")
    return found[0] if found else None


def _destroy(run: Any, graph: Any, module: Any) -> None:
    driver.cuGraphExecDestroy(run)
    driver.cuGraphDestroy(graph)
    driver.cuModuleUnload(module)
