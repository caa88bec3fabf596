"""The kernel by which processes exchange numbers through memory that all of them can write."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # words of a program
PATIENCE = 1 << 29  # looks for what another process sends, of about a microsecond each


@triton.jit
def _exchange(
    x, y, inboxes, turns, count, room,
    RANK: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr, PATIENCE: tl.constexpr,
):  # fmt: skip
    """y[i] = Σ over ranks of Σ over parts of x[part, i], or y[rank, i] = that rank's word x[i].

    A word is written with the turn of the program that it is for, 8 bytes at once, so whoever reads
    the turn has the word. Each inbox has room for two turns: a program is in the next but one only
    after all others were in the next one, and so have read what they were sent in this.
    """
    program = tl.program_id(0)
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


def exchange(
    x: Tensor, y: Tensor, inboxes: Tensor, turns: Tensor, room: int, rank: int, parts: int
) -> None:
    """Sums of x (parts, n) to y (n,) fp32; or for no `parts`, words x (n,) to y (ranks, n) int32.

    inboxes: (ranks,) int64, the addresses of 2 · ranks · `room` words of 8 bytes each, 0 at first.
    turns: (programs,) int32, 0 at first. `rank` is this process's. Every process calls it alike.
    """
    count = x.numel() // max(1, parts)
    _exchange[(triton.cdiv(count, BLOCK),)](
        x, y, inboxes, turns, count, room, RANK=rank, RANKS=len(inboxes), PARTS=parts,
        ADD=parts > 0, BLOCK=BLOCK, PATIENCE=PATIENCE, num_warps=4,
    )  # fmt: skip
