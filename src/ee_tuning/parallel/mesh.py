"""Which part of a run this process is: the axes pp, dp and tp of its processes."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ee_tuning.errors import Interrupted, ProcessFailed, UserError, first_line

Value = TypeVar("Value")
AXES = ("pp", "dp", "tp")  # from the outermost: neighbours in rank share a tensor-parallel group
# A device's collectives may wait longer than the host's, whose time-out has the better message.
GRACE = timedelta(minutes=1)
LONGEST = 1e9  # seconds, which torch can still count
# torch 2.13 has new names for these and warns of the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def own_rank() -> int:
    """This process's number among those that torchrun started: 0 is the one that prints."""
    return int(os.environ.get("RANK", 0))


class Mesh:
    """The processes of a run, ``pp · dp · tp`` of them, and the place of this one.

    A single process is a mesh of 1·1·1, without a process group: every method then gives back
    what it was given.
    """

    def __init__(self, dp: int = 1, tp: int = 1, pp: int = 1) -> None:
        """The sizes of the axes; `connect` joins the other processes.

        Raises:
            UserError: a size below 1.
        """
        self.dp, self.tp, self.pp = dp, tp, pp
        self.size = dp * tp * pp
        self.rank = own_rank() if self.size > 1 else 0
        self.patience = 0.0  # seconds to wait for another process at most
        self._all = list(range(self.size))  # their numbers among all that were started
        self.doing = "the start"  # for messages
        self._last: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._device_mesh: DeviceMesh | None = None
        self._host: dist.ProcessGroup | None = None
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UserError(f"{axis} is {getattr(self, axis)}: it must be at least 1")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and shows what belongs to the whole run."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """This process's place on the data-parallel axis."""
        return self.rank // self.tp % self.dp

    @property
    def tp_rank(self) -> int:
        """This process's place on the tensor-parallel axis."""
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        """This process's stage, counted from 0."""
        return self.rank // (self.tp * self.dp)

    @property
    def name(self) -> str:
        """How messages call this process: ``rank 3 (pp 1, dp 0, tp 1)``."""
        return f"rank {self.rank} (pp {self.pp_rank}, dp {self.dp_rank}, tp {self.tp_rank})"

    def connect(self, device: torch.device, timeout: float) -> None:
        """Join the other processes; NCCL between GPUs, gloo between hosts.

        timeout: seconds after which a process that waits in vain for another one gives up.

        Raises:
            UserError: the axes' sizes do not multiply to the number of processes, or nothing can be
                waited for so long.
        """
        if not 0 < timeout <= LONGEST:
            raise UserError(
                f"timeout is {timeout:g}: give seconds, above 0 and at most {LONGEST:g}"
            )
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if processes != self.size:
            raise UserError(
                f"dp {self.dp} × tp {self.tp} × pp {self.pp} is {self.size}, the number of "
                f"processes is {processes}: start as many with torchrun --nproc-per-node "
                f"{self.size} -m ee_tuning …"
            )
        if self.size == 1:
            return
        on_gpu = device.type == "cuda"
        self.patience, patience = timeout, timedelta(seconds=timeout)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        patient = patience + GRACE if on_gpu else patience
        # torchrun keeps its store through restarts: what a failed attempt left there is not ours.
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        store = dist.PrefixStore(f"attempt {restarts()}", store)
        dist.init_process_group(backend, None, patient, size, rank, store)
        shape = (self.pp, self.dp, self.tp)
        self._device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
        self._host = dist.new_group(backend="gloo", timeout=patience)

    @contextmanager
    def connected(
        self,
        device: torch.device,
        timeout: float,
        advice: str = "The last checkpoint is good: go on with --resume",
    ) -> Iterator[None]:
        """Inside, the processes are joined; see `connect`. advice: for after a failure.

        Raises:
            ProcessFailed: anything but a mistake of the user goes wrong in a run of several
                processes: names this one and what it was `doing`.
        """
        try:
            with _told_to_end(self.size):
                self.connect(device, timeout)
                yield
                self._free()
                self.barrier()
        except (UserError, Interrupted):
            raise
        except Exception as error:
            if self.size == 1:
                raise
            raise ProcessFailed(
                f"{self.name} failed at {self.doing}: {first_line(error)}; if that is a lost "
                f"connection or a time-out, another rank died or hangs. {advice}"
            ) from error
        if self.size > 1:
            dist.destroy_process_group()

    def frees(self, clear: Callable[[], None]) -> None:
        """Call a method of an object that is still there when the processes part.

        For what has captured sums in graphs: NCCL does not let go of a group before these.
        """
        self._last.append(weakref.WeakMethod(clear))

    def _free(self) -> None:
        for reference in self._last:
            if (clear := reference()) is not None:
                clear()
        self._last.clear()
        gc.collect()

    def of_one_model(self) -> Mesh:
        """The processes of a connected mesh that have parts of one model, as a mesh of their own.

        Every process calls it.
        """
        if self.dp == 1:
            return self
        own = Mesh(tp=self.tp, pp=self.pp)
        own.rank, own._device_mesh = self.tp_rank + self.tp * self.pp_rank, self._device_mesh
        own.patience, patience = self.patience, timedelta(seconds=self.patience)
        for part in range(self.dp):
            ranks = [rank for rank in self._all if rank // self.tp % self.dp == part]
            group = None
            if own.size > 1:
                group = dist.new_group(ranks, backend="gloo", timeout=patience)
            if part == self.dp_rank:
                own._all, own._host = ranks, group
        return own

    def axis(self, name: str) -> DeviceMesh:
        """The processes that differ from this one on one axis only."""
        assert self._device_mesh is not None, "a mesh of one process has no axes"
        return self._device_mesh[name]

    def group(self, name: str) -> dist.ProcessGroup:
        """The process group of `axis`."""
        return self.axis(name).get_group()

    @property
    def host(self) -> dist.ProcessGroup:
        """All processes, for tensors on the host."""
        assert self._host is not None, "a mesh of one process has no group"
        return self._host

    def sum_over(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """`values`, on the run's device, summed in place over an axis."""
        if getattr(self, name) > 1:
            dist.all_reduce(values, group=self.group(name))
        return values

    # -- between hosts -------------------------------------------------------------------------

    def sum_on_host(self, values: Sequence[float]) -> list[float]:
        """The sum over all processes of each of `values`."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._host)
        return total.tolist()

    def gather_on_host(self, value: Value) -> list[Value]:
        """The `value` of every process, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._host)
        return found

    def on_main(self, function: Callable[[], Value]) -> Value:
        """What `function` gives on the main process, where alone it is called.

        Raises:
            UserError: on every process, if it does on the main one.
        """
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except UserError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=self._all[0], group=self._host)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def on_all(self, function: Callable[[], Value]) -> Value:
        """What `function`, which waits for no other process, gives on this one.

        Raises:
            UserError: on every process, if it does on one: the first one's.
        """
        result, error = None, None
        try:
            result = function()
        except UserError as mistake:
            error = mistake
        for found in self.gather_on_host(error):
            if found is not None:
                raise found
        return result  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier(self._host)

    def check_same(self, what: str, digest: str) -> None:
        """Refuse processes that were started differently.

        Raises:
            UserError: names the first process whose `digest` of `what` is not the main one's.
        """
        digests = self.gather_on_host(digest)
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise UserError(
                    f"rank {rank} has other {what} than rank 0: give every process the same"
                )

    def counterpart(self, stage: int) -> int:
        """The number, among all that were started, of the process in a stage that is like this."""
        return self._all[self.rank + (stage - self.pp_rank) * self.tp * self.dp]

    @cached_property
    def next_stage(self) -> int:
        """This process's `counterpart` in the next stage."""
        return self.counterpart(self.pp_rank + 1)

    @cached_property
    def previous_stage(self) -> int:
        """This process's `counterpart` in the stage before."""
        return self.counterpart(self.pp_rank - 1)

    @cached_property
    def speaker(self) -> int:
        """The number of the first process that has parts of the same layers as this."""
        return self._all[self.rank - self.tp_rank]


class _ToldToEnd(Exception):
    """Another process has sent SIGTERM."""


@contextmanager
def _told_to_end(processes: int) -> Iterator[None]:
    """Inside, one of several processes that is told to end says so, like one that loses another.

    torchrun does that once a process is dead, perhaps before others have noticed. Once something
    went wrong the signal is not heard any more: it must not come before the line on that.
    """
    if processes == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _ToldToEnd("it was told to end, as torchrun does when another rank is dead")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Exception:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    signal.signal(signal.SIGTERM, before)


def restarts() -> int:
    """How often torchrun has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


ALONE = Mesh()  # one process
