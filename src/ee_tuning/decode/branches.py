"""One CUDA graph of several captured pieces, each of which says whether the next one runs.

The next piece is the body of a conditional node (CUDA 12.4), so the host is not asked. torch has no
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

LEAST_DRIVER = 12040
# Sets a condition to what is at an address. In PTX, since the function that it calls has no
# address on the host, and a compiler for CUDA need not be there.
SET_CONDITION = b"""
.version 7.0
.target sm_60
.address_size 64
.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);
.visible .entry set_condition(.param .u64 address, .param .u64 handle)
{
    .reg .b32 %value;
    .reg .b64 %address, %handle;
    ld.param.u64 %address, [address];
    ld.param.u64 %handle, [handle];
    cvta.to.global.u64 %address, %address;
    ld.global.u32 %value, [%address];
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
    return bool(_checked(driver.cuDriverGetVersion()) >= LEAST_DRIVER)


class Branches:
    """Pieces in one graph: each runs if `goes_on` (1,) int32 is not 0 after the one before, and
    what is `last` behind them.

    Raises:
        RuntimeError: the driver refuses.
    """

    def __init__(
        self,
        pieces: Sequence[torch.cuda.CUDAGraph],
        goes_on: Tensor,
        last: torch.cuda.CUDAGraph | None = None,
    ) -> None:
        """pieces, last: captured, with their graphs kept. They keep the memory they work in."""
        self._pieces, self._goes_on = [*pieces, last], goes_on
        self._module = _checked(driver.cuModuleLoadData(SET_CONDITION))
        graph = inner = _checked(driver.cuGraphCreate(0))
        node = top = _child(graph, None, pieces[0])
        for piece in pieces[1:]:
            branch, body = self._branch(graph, inner, node)
            top = branch if inner is graph else top
            inner, node = body, _child(body, None, piece)
        if last is not None:
            _child(graph, top, last)
        self._run = _checked(driver.cuGraphInstantiate(graph, 0))
        weakref.finalize(self, _destroy, self._run, graph, self._module).atexit = False

    def _branch(self, graph: Any, inner: Any, node: Any) -> tuple[Any, Any]:
        """A condition behind `node` of `inner`, part of `graph`: its own node, and its body."""
        context = _checked(driver.cuCtxGetCurrent())
        handle = _checked(driver.cuGraphConditionalHandleCreate(graph, context, 0, 0))
        setter = driver.CUDA_KERNEL_NODE_PARAMS()
        setter.func = _checked(driver.cuModuleGetFunction(self._module, b"set_condition"))
        for size in ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ"):
            setattr(setter, size, 1)
        values = self._goes_on.data_ptr(), int(handle)
        setter.kernelParams = values, (ctypes.c_void_p, ctypes.c_ulonglong)
        told = _checked(driver.cuGraphAddKernelNode(inner, [node], 1, setter))
        branch = driver.CUgraphNodeParams()
        branch.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        branch.conditional.handle, branch.conditional.ctx = handle, context
        branch.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        branch.conditional.size = 1
        edges = [None] if driver.CUDA_VERSION >= 13000 else []  # kinds of edges: the usual one
        node = _checked(driver.cuGraphAddNode(inner, [told], *edges, 1, branch))
        return node, branch.conditional.phGraph_out[0]

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
