"""The memory that the processes of a group share, and what they exchange by it."""

from __future__ import annotations

import logging
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:  # comes with torch for CUDA alone
    from ee_tuning.peers import kernel
except ImportError:
    kernel = None  # type: ignore[assignment]

ROOM = 1 << 20  # words of 4 bytes that a process sends at a time; more go through NCCL
log = logging.getLogger(__name__)


class Inbox:
    """What the other processes of a group write to this one, and where this one writes to them."""

    def __init__(self, group: Any, device: torch.device) -> None:
        """group: the process group, of GPUs that can reach each other's memory.

        Raises:
            RuntimeError: the driver refuses.
        """
        from torch.distributed import _symmetric_memory as symmetric  # not public: only if needed

        ranks = group.size()
        self.group, self.rank = group, group.rank()
        self._words = symmetric.empty(2 * ranks * ROOM, dtype=torch.int64, device=device)
        self._words.zero_()
        torch.cuda.synchronize(device)  # before another process writes
        self._handle = symmetric.rendezvous(self._words, group)
        self._all = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        programs = -(-ROOM // kernel.BLOCK)
        self._turns = torch.zeros(programs, dtype=torch.int32, device=device)

    def total(self, parts: Tensor) -> Tensor:
        """See `total`."""
        y = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
        x, boxes = parts.contiguous(), (self._all, self._turns)
        kernel.exchange(x, y, *boxes, ROOM, self.rank, len(parts))
        return y

    def gather(self, words: Tensor) -> Tensor:
        """Every process's words (n,) int32: (ranks, n)."""
        y = words.new_empty(len(self._all), len(words))
        kernel.exchange(words, y, self._all, self._turns, ROOM, self.rank, 0)
        return y


_inboxes: dict[str, Any] = {}  # by the name of the group


def share(name: str, device: torch.device) -> None:
    """Let the processes of a group exchange what is small by way of their memory from now on.

    Every process of the group calls it. Where they are not on GPUs that reach each other's memory,
    nothing changes.
    """
    from torch.distributed.distributed_c10d import _resolve_process_group  # nor this

    group: Any = _resolve_process_group(name)  # type: ignore[arg-type]
    kept = _inboxes.get(name)
    if kept is not None and kept.group is group:
        return
    _inboxes.pop(name, None)
    if not _all(group, kernel is not None and device.type == "cuda"):
        return
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, (socket.gethostname(), device.index), group)
    hosts, others = {host for host, _ in places}, {index for _, index in places} - {device.index}
    reached = len(hosts) == 1 and all(
        torch.cuda.can_device_access_peer(device, other) for other in others
    )
    if not _all(group, reached and len(others) == group.size() - 1):
        return
    found, refused = None, None
    try:
        found = Inbox(group, device)
    except RuntimeError as error:
        refused = error
    if _all(group, found is not None):
        _inboxes[name] = found
    else:
        log.warning("sums of --tp go through NCCL, which is slower: %s", refused or "another rank")


def _all(group: Any, value: bool) -> bool:
    """Whether that is so for every process of a group."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, value, group)
    return all(found)


def holds(name: str, count: int) -> bool:
    """Whether a group exchanges so many words of 4 bytes by way of its memory."""
    return name in _inboxes and count <= ROOM


@torch.library.custom_op("ee_tuning::peers_total", mutates_args=())
def total(parts: Tensor, name: str) -> Tensor:
    """(S, …) of each process: added up over S, then over the processes in their order, (…) fp32."""
    return _inboxes[name].total(parts)


@total.register_fake
def _(parts: Tensor, name: str) -> Tensor:
    return parts.new_empty(parts.shape[1:], dtype=torch.float32)


@torch.library.custom_op("ee_tuning::peers_gather", mutates_args=())
def gather(x: Tensor, size: int, name: str) -> Tensor:
    """Every process's x (…): (size, …), bit for bit."""
    flat = x.flatten()
    if spare := -flat.nbytes % 4 // x.dtype.itemsize:
        flat = torch.nn.functional.pad(flat, (0, spare))
    found = _inboxes[name].gather(flat.contiguous().view(torch.int32)).view(x.dtype)
    return found[:, : x.numel()].reshape(size, *x.shape)


@gather.register_fake
def _(x: Tensor, size: int, name: str) -> Tensor:
    return x.new_empty(size, *x.shape)
