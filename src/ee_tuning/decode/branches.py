"""One CUDA graph of several captured pieces, each of which says which one runs next, if any.

A next piece is the body of a conditional node (CUDA 12.4), so the host is not asked. torch has no
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
# Sets two conditions, each to whether the number at an address is another one. In PTX, since the
# function that it calls has no address on the host, and a compiler for CUDA need not be there.
_SET_CONDITION = """\
    ld.param.u64 %handle, [handle{0}];
    ld.param.f64 %wanted, [wanted{0}];
    setp.eq.f64 %same, %given, %wanted;
    selp.b32 %value, 1, 0, %same;
    {{
        .param .b64 first;
        .param .b32 second;
        st.param.b64 [first], %handle;
        st.param.b32 [second], %value;
        call.uni cudaGraphSetConditional, (first, second);
    }}
"""
SET_CONDITIONS = f"""
.version 7.0
.target sm_60
.address_size 64
.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);
.visible .entry set_conditions(.param .u64 address, .param .u64 handle0, .param .f64 wanted0,
    .param .u64 handle1, .param .f64 wanted1)
{{
    .reg .pred %same;
    .reg .b32 %value;
    .reg .b64 %address, %handle;
    .reg .f64 %given, %wanted;
    ld.param.u64 %address, [address];
    cvta.to.global.u64 %address, %address;
    ld.global.f64 %given, [%address];
{_SET_CONDITION.format(0)}{_SET_CONDITION.format(1)}    ret;
}}
\0""".encode()


def can_branch() -> bool:
    """Whether the current device's graphs can have branches."""
    if driver is None or not torch.cuda.is_available() or not torch.version.cuda:
        return False
    return bool(_checked(driver.cuDriverGetVersion()) >= LEAST_DRIVER)


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
    ) -> None:
        """steps: of each one variant or two; see `Graphs.branched`. steps, last: captured, with
        their graphs kept. They keep the memory they work in."""
        self._steps, self._last, self._goes_on = steps, last, goes_on
        self._module = _checked(driver.cuModuleLoadData(SET_CONDITIONS))
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
        variants = [*enumerate(self._steps[number])][least:]
        handles = [self._handle() for _ in variants]
        told = zip(handles, (variant + 1 for variant, _ in variants), strict=True)
        node = self._tell(inner, node, [*told])
        for handle, (variant, piece) in zip(handles, variants, strict=True):
            node, body = self._branch(inner, node, handle)
            self._add(body, _child(body, None, piece), number + 1, variant)
        return node

    def _handle(self) -> Any:
        context = _checked(driver.cuCtxGetCurrent())
        return _checked(driver.cuGraphConditionalHandleCreate(self._graph, context, 0, 0))

    def _tell(self, inner: Any, node: Any, told: Sequence[tuple[Any, int]]) -> Any:
        """What sets conditions, each to whether `goes_on` is a number, behind a node."""
        setter = driver.CUDA_KERNEL_NODE_PARAMS()
        setter.func = _checked(driver.cuModuleGetFunction(self._module, b"set_conditions"))
        for size in ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ"):
            setattr(setter, size, 1)
        values = [value for handle, number in (told[0], told[-1])
                  for value in (int(handle), float(number))]  # fmt: skip
        kinds = ctypes.c_void_p, *(ctypes.c_ulonglong, ctypes.c_double) * 2
        setter.kernelParams = (self._goes_on.data_ptr(), *values), kinds
        return _checked(driver.cuGraphAddKernelNode(inner, [node], 1, setter))

    def _branch(self, inner: Any, node: Any, handle: Any) -> tuple[Any, Any]:
        """A condition behind a node: its own node, and its body."""
        branch = driver.CUgraphNodeParams()
        branch.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        branch.conditional.handle = handle
        branch.conditional.ctx = _checked(driver.cuCtxGetCurrent())
        branch.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        branch.conditional.size = 1
        edges = [None] if driver.CUDA_VERSION >= 13000 else []  # kinds of edges: the usual one
        node = _checked(driver.cuGraphAddNode(inner, [node], *edges, 1, branch))
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
