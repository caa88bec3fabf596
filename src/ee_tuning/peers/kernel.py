"""The kernel by which processes exchange numbers through memory that all of them can write."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # words of a program
# Bytes of the next product's weights that are brought into the cache meanwhile: what memory gives
# while a sum and the norm behind it are computed. By so many threads of a program, each so many.
AHEAD, THREADS, EACH = 12 << 20, 128, 4096
PATIENCE = 1 << 29  # looks for what another process sends, of about a microsecond each


@triton.jit
def _exchange(
    x, y, inboxes, turns, ahead, count, room, bytes,
    RANK: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr, PATIENCE: tl.constexpr, FETCH: tl.constexpr, THREADS: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """`_swap`, and where that is to `FETCH`, more programs that bring what lies `ahead` into the
    cache."""
    program, number = tl.program_id(0), tl.cdiv(count, BLOCK)
    if program < number:
        _swap(x, y, inboxes, turns, program, count, room, RANK, RANKS, PARTS, ADD, BLOCK, PATIENCE)
    elif FETCH:
        at = ((program - number) * THREADS + tl.arange(0, THREADS)) * EACH
        at = tl.minimum(at, bytes - EACH)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, $2;", "=r,l,r",
            [ahead.to(tl.int64) + at, tl.full((THREADS,), EACH, tl.int32)], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def _swap(
    x, y, inboxes, turns, program, count, room,
    RANK: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr, PATIENCE: tl.constexpr,
):  # fmt: skip
    """y[i] = Σ over ranks of Σ over parts of x[part, i], or y[rank, i] = that rank's word x[i].

    A word is written with the turn of the program that it is for, 8 bytes at once, so whoever reads
    the turn has the word. Each inbox has room for two turns: a program is in the next but one only
    after all others were in the next one, and so have read what they were sent in this.
    """
    at = program * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    own = tl.load(x + at, mask=there, other=0)
    if ADD:
        own = own.to(tl.float32)
        for part in tl.static_range(1, PARTS):
            own += tl.load(x + part * count + at, mask=there, other=0).to(tl.float32)
        word = own.to(tl.int32, bitcast=True)
    else:
        word = own
    turn = tl.load(turns + program) + 1
    side = (turn & 1).to(tl.int64) * RANKS * room
    sent = (turn.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            theirs = tl.load(inboxes + rank).to(tl.pointer_type(tl.int64))
            tl.store(theirs + side + RANK * room + at, sent, mask=there)
    mine = tl.load(inboxes + RANK).to(tl.pointer_type(tl.int64))
    sums = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(RANKS):
        found = word
        if rank != RANK:
            place = mine + side + rank * room + at
            got = tl.load(place, mask=there, other=0, volatile=True)
            looks = 0
            while tl.max(((got >> 32 != turn) & there).to(tl.int32), 0) > 0:
                if looks == PATIENCE:  # another process is gone: this one must not wait for ever
                    tl.inline_asm_elementwise(
                        "trap; mov.b32 $0, $1;", "=r,r", [looks], tl.int32, False, 1
                    )
                looks += 1
                got = tl.load(place, mask=there, other=0, volatile=True)
            found = got.to(tl.int32)
        if ADD:
            sums += found.to(tl.float32, bitcast=True)
        else:
            tl.store(y + rank * count + at, found, mask=there)
    if ADD:
        tl.store(y + at, sums, mask=there)
    tl.store(turns + program, turn)


def can_fetch(device: torch.device) -> bool:
    """Whether a GPU brings memory into its cache at a word: Hopper's, and later ones."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def exchange(
    x: Tensor, y: Tensor, inboxes: Tensor, turns: Tensor, room: int, rank: int, parts: int,
    ahead: Tensor | None = None,
) -> None:  # fmt: skip
    """Sums of x (parts, n) to y (n,) fp32; or for no `parts`, words x (n,) to y (ranks, n) int32.

    inboxes: (ranks,) int64, the addresses of 2 · ranks · `room` words of 8 bytes each, 0 at first.
    turns: (programs,) int32, 0 at first. `rank` is this process's. Every process calls it alike.
    ahead: what the next product reads, to be brought into the cache meanwhile; `can_fetch` says
    whether a GPU does.
    """
    count = x.numel() // max(1, parts)
    bytes, lies = (0, x) if ahead is None else (min(ahead.nbytes, AHEAD) // EACH * EACH, ahead)
    more = triton.cdiv(bytes, THREADS * EACH)
    _exchange[(triton.cdiv(count, BLOCK) + more,)](
        x, y, inboxes, turns, lies, count, room, bytes, RANK=rank, RANKS=len(inboxes), PARTS=parts,
        ADD=parts > 0, BLOCK=BLOCK, PATIENCE=PATIENCE, FETCH=more > 0, THREADS=THREADS, EACH=EACH,
        num_warps=4,
    )  # fmt: skip
