"""Kernels whose sums have one order, however many tokens share a launch.

Each gives the numbers of a token by the same operations in the same order, whatever else is in the
launch: the tiles along what is summed over are of a fixed size and start at fixed places, and what
lies behind a text's end is never added.

The compiler takes them as they are: what they do to begin early it could not read.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

KEYS = 64  # that one program looks at
CHUNK = 64  # tokens of a window from which on it is cut in larger tiles
WHOLE = tl.constexpr(2.0**40)  # times which weights, up to 1, are added up as whole numbers
GROUP = 16  # of programs whose results are added up at a time
BOTH = 2**15  # bytes of shared memory that a program's keys and values may take side by side


@triton.jit
def _begin(EARLY: tl.constexpr):
    """Wait for the kernels before; those behind may come onto the device from now on."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _product(
    x, w, y, tokens, rows, width, share,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y[part, token, row] = the part's sum of x[token] · w[row]."""
    _begin(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(2)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    start, stop = part * share, tl.minimum((part + 1) * share, width)
    for first in range(start, stop, WIDTH):
        at = first + tl.arange(0, WIDTH)
        weights = tl.load(
            w + row.to(tl.int64)[:, None] * width + at[None, :],
            mask=(row[:, None] < rows) & (at[None, :] < stop), other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        values = tl.load(
            x + token[None, :] * width + at[:, None],
            mask=(token[None, :] < tokens) & (at[:, None] < stop), other=0.0,
        )  # fmt: skip
        total = tl.dot(weights, values, total, input_precision=PRECISION)
    places = (part * tokens + token[None, :]).to(tl.int64) * rows + row[:, None]
    tl.store(y + places, total, mask=(row[:, None] < rows) & (token[None, :] < tokens))


@triton.jit
def _attend(
    q, k, v, slots, positions, maxima, sums, found,
    q_row, q_head, q_token, k_slot, k_head, k_place, v_slot, v_head, v_place, slots_row,
    positions_row, places, window, scale, cap, tokens, chunks,
    HEADS: tl.constexpr, SHARED: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    WIDTH: tl.constexpr, OUT: tl.constexpr, WIDTH_2: tl.constexpr, OUT_2: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, SOON: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What the queries that share a head of K/V find among KEYS positions."""
    _begin(EARLY)
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    chunk = tl.program_id(1)
    first, slot = tl.load(positions + row * positions_row), tl.load(slots + row * slots_row)
    last = first + tokens - 1
    if (chunk * KEYS <= last) & ((chunk + 1) * KEYS > first - window + 1):
        query = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
        token, shared = query // SHARED, query % SHARED
        at, out = tl.arange(0, WIDTH_2), tl.arange(0, OUT_2)
        position = chunk * KEYS + tl.arange(0, KEYS)
        place = position % places
        asked = tl.load(
            q + row * q_row + (head * SHARED + shared)[:, None] * q_head
            + token[:, None] * q_token + at[None, :],
            mask=(token[:, None] < tokens) & (at[None, :] < WIDTH), other=0.0,
        )  # fmt: skip
        keys = tl.load(
            k + slot * k_slot + head * k_head + place[None, :] * k_place + at[:, None],
            mask=(position[None, :] <= last) & (at[:, None] < WIDTH), other=0.0,
        )  # fmt: skip
        there = v + slot * v_slot + head * v_head + place[:, None] * v_place + out[None, :]
        known = (position[:, None] <= last) & (out[None, :] < OUT)
        if SOON:  # where they are needed, one would wait for memory again
            values = tl.load(there, mask=known, other=0.0)
        scores = tl.dot(asked, keys, input_precision=PRECISION) * scale
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
        own = first + token
        seen = (position[None, :] <= own[:, None]) & (position[None, :] > own[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        most = tl.max(scores, 1)
        weights = tl.exp(scores - tl.where(most == float("-inf"), 0.0, most)[:, None])
        if not SOON:
            values = tl.load(there, mask=known, other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        cell = ((row * HEADS + head) * chunks + chunk).to(tl.int64) * tokens * SHARED + query
        kept = token < tokens
        tl.store(maxima + cell, most, mask=kept)
        # As whole numbers, exactly: few queries are laid out otherwise than many, and so are sums.
        whole = tl.sum((weights * WHOLE).to(tl.int64), 1)
        tl.store(sums + cell, whole.to(tl.float32) * (1 / WHOLE), mask=kept)
        tl.store(
            found + cell[:, None] * OUT + out[None, :], mixed,
            mask=kept[:, None] & (out[None, :] < OUT),
        )  # fmt: skip


@triton.jit
def _gather(
    maxima, sums, found, positions, sinks, y, positions_row, window, tokens, chunks,
    HEADS: tl.constexpr, SHARED: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    OUT: tl.constexpr, OUT_2: tl.constexpr, SINKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What one query found, of all the chunks that it sees."""
    _begin(EARLY)
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    query = tl.program_id(1)
    token, shared = query // SHARED, query % SHARED
    own = tl.load(positions + row * positions_row) + token
    least, most = tl.maximum(own - window + 1, 0) // KEYS, own // KEYS
    base = (row * HEADS + head).to(tl.int64) * chunks
    out = tl.arange(0, OUT_2)
    top = -float("inf")
    for first in range(least // GROUP * GROUP, most + 1, GROUP):
        chunk = first + tl.arange(0, GROUP)
        cell = (base + chunk) * tokens * SHARED + query
        within = (chunk >= least) & (chunk <= most)
        top = tl.maximum(top, tl.max(tl.load(maxima + cell, mask=within, other=-float("inf")), 0))
    total, mixed = 0.0, tl.zeros((OUT_2,), tl.float32)
    if SINKS:
        sink = tl.load(sinks + head * SHARED + shared).to(tl.float32)
        top = tl.maximum(top, sink)
        total = tl.exp(sink - top)
    for first in range(least // GROUP * GROUP, most + 1, GROUP):
        chunk = first + tl.arange(0, GROUP)
        cell = (base + chunk) * tokens * SHARED + query
        within = (chunk >= least) & (chunk <= most)
        factor = tl.exp(tl.load(maxima + cell, mask=within, other=-float("inf")) - top)
        total += tl.sum(factor * tl.load(sums + cell, mask=within, other=0.0), 0)
        part = tl.load(
            found + cell[:, None] * OUT + out[None, :],
            mask=within[:, None] & (out[None, :] < OUT), other=0.0,
        )  # fmt: skip
        mixed += tl.sum(factor[:, None] * part, 0)
    place = (row * tokens + token) * HEADS * SHARED + head * SHARED + shared
    tl.store(y + place.to(tl.int64) * OUT + out, mixed / total, mask=out < OUT)


def tiles(rows: int, width: int, tokens: int, size: int = 2) -> tuple[dict[str, int], int, int]:
    """How a product of M tokens with weights (rows, width) is cut: along `width` always alike.

    size: bytes of a number. Gives the kernel's constants, in how many parts `width` is added up,
    enough to keep the multiprocessors busy, and how much of it is a part's; found by a search on
    an H100, of many tokens an H200, over the shapes of 135 M and 7 B parameters.
    """
    if rows < 2048 or width < 256:
        cut = {"ROWS": 16, "WIDTH": 64 if width <= 1024 else 128, "num_warps": 2, "num_stages": 5}
    else:
        cut = {"ROWS": 64, "WIDTH": 128, "num_warps": 4, "num_stages": 3}
    cut["TOKENS"] = min(max(16, triton.next_power_of_2(tokens)), 64)
    tiles = triton.cdiv(rows, cut["ROWS"])
    parts = 1 if tiles >= 264 else 2 if tiles >= 132 else 4
    share = triton.cdiv(triton.cdiv(width, parts), cut["WIDTH"]) * cut["WIDTH"]
    if tokens > CHUNK and cut["ROWS"] == 64 and size == 2:  # what is read is used more often
        cut |= {"WIDTH": 64, "TOKENS": 128}
        cut |= {"ROWS": 128, "num_warps": 8} if tokens > 2 * CHUNK else {}
    return cut, parts, share


def precision(dtype: torch.dtype) -> str:
    """Of the matrix units' products: fp32 is fp32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@cache
def early(device: torch.device) -> dict[str, Any]:
    """How kernels are launched on a device: where it can, each comes onto the multiprocessors while
    the one before it ends (CUDA's programmatic dependent launch)."""
    able = torch.version.cuda and torch.cuda.get_device_capability(device) >= (9, 0)
    if not able or not hasattr(tl.extra.cuda, "gdc_wait"):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@custom_op("ee_tuning::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K) times weight (N, K): (S, M, N) fp32, to be added up over S parts of K."""
    (tokens, width), rows = x.shape, weight.shape[0]
    cut, parts, share = tiles(rows, width, tokens, x.element_size())
    y = torch.empty((parts, tokens, rows), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, cut["ROWS"]), triton.cdiv(tokens, cut["TOKENS"]), parts)
    how: dict[str, Any] = {"PRECISION": precision(x.dtype)} | cut | early(x.device)
    _product[grid](x, weight, y, tokens, rows, width, share, **how)
    return y


@product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    rows, width = weight.shape
    parts = tiles(rows, width, 1)[1]
    return x.new_empty((parts, x.shape[0], rows), dtype=torch.float32)


@custom_op("ee_tuning::attend", mutates_args=())
def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    reach: int,
    window: int,
    scale: float,
    cap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of windows to what their slots keep: (n, T, heads, D).

    query: (n, heads, T, E); keys, values: (slots, K/V heads, places, E or D), a ring over
    positions; slots: (n,) int64; positions: (n, T) int64, one after another in a row. reach: no
    query stands at this position or behind it. window: how many tokens a query sees. cap: of
    soft-capping, 0 for none. sinks: (heads,), a score of each head that takes weight from all.
    """
    number, heads, tokens, width = query.shape
    of_kv, places, out = keys.shape[1], keys.shape[2], values.shape[3]
    shared, chunks = heads // of_kv, triton.cdiv(reach, KEYS)
    like: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    maxima = torch.empty((number, of_kv, chunks, tokens * shared), **like)
    sums = torch.empty_like(maxima)
    found = torch.empty((*maxima.shape, out), **like)
    y = torch.empty((number, tokens, heads, out), dtype=query.dtype, device=query.device)
    width_2, out_2 = (max(16, triton.next_power_of_2(size)) for size in (width, out))
    own: dict[str, Any] = {
        "HEADS": of_kv, "SHARED": shared, "KEYS": KEYS, "OUT": out, "OUT_2": out_2,
        **early(query.device),
    }  # fmt: skip
    queries = 16 if tokens < CHUNK else 64
    grid = (number * of_kv, chunks, triton.cdiv(tokens * shared, queries))
    _attend[grid](
        query, keys, values, slots, positions, maxima, sums, found,
        query.stride(0), query.stride(1), query.stride(2),
        keys.stride(0), keys.stride(1), keys.stride(2),
        values.stride(0), values.stride(1), values.stride(2), slots.stride(0),
        positions.stride(0), places, window, scale, cap, tokens, chunks,
        QUERIES=queries, WIDTH=width, WIDTH_2=width_2, CAPPED=cap > 0,
        PRECISION=precision(query.dtype),
        SOON=KEYS * (width_2 + out_2) * keys.element_size() <= BOTH,
        num_warps=4, num_stages=1, **own,
    )  # fmt: skip
    _gather[(number * of_kv, tokens * shared)](
        maxima, sums, found, positions, y if sinks is None else sinks, y, positions.stride(0),
        window, tokens, chunks, GROUP=GROUP, SINKS=sinks is not None, num_warps=1, **own,
    )  # fmt: skip
    return y


@attend.register_fake
def _(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, reach: int,
    window: int, scale: float, cap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    number, heads, tokens, _ = query.shape
    return query.new_empty((number, tokens, heads, values.shape[3]))
