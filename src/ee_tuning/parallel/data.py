"""Data parallelism: samples dealt to the ranks, gradients of the exits summed over them.

With --shard, each rank keeps a part of the exits' parameters, gradients and optimizer state. The
whole parameters of an exit exist while it is at work, as the copies that the step makes anyway
(`ee_tuning.tune.optimizers.working_copies`), and its whole gradients until they are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ee_tuning.errors import UserError
from ee_tuning.exits import Exit
from ee_tuning.fingerprint import PART
from ee_tuning.losses import IGNORED
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import Mesh, reduce_scatter
from ee_tuning.slices import SplitParameter, split_parameter

Item = TypeVar("Item")
Key = TypeVar("Key")
Batch = dict[str, Tensor]


def deal(items: Sequence[Item], mesh: Mesh) -> list[Item]:
    """This rank's share of what the data-parallel ranks work on together, in order.

    Each item goes to one rank, so sums over the ranks do not depend on their number.
    """
    return list(items[mesh.dp_rank :: mesh.dp])


def collect(own: Iterable[Item], mesh: Mesh) -> list[Item]:
    """What every rank made of its share, in the order before it was dealt; on every rank. Ranks
    of --tp and --pp made the same."""
    shares = mesh.gather_on_host(list(own))[:: mesh.tp][: mesh.dp]
    return [shares[k % mesh.dp][k // mesh.dp] for k in range(sum(map(len, shares)))]


def collect_stages(own: Sequence[Any], mesh: Mesh) -> list[Any]:
    """As `collect`, of sums over stages: of each share what all stages make of it, added up."""
    shares = mesh.gather_on_host(list(own))[:: mesh.tp]
    sums = [
        [sum(parts[1:], parts[0]) for parts in zip(*shares[rank :: mesh.dp], strict=True)]
        for rank in range(mesh.dp)
    ]
    return [sums[k % mesh.dp][k // mesh.dp] for k in range(sum(map(len, sums)))]


def collect_hashes(own: Mapping[Key, str], mesh: Mesh, what: str = PART) -> dict[Key, str]:
    """Hashes of the parts of a model of which each process may have some; `own`: of these.

    what: a part is called in a message.

    Raises:
        UserError: two processes read different values of a part.
    """
    found: dict[Key, str] = {}
    for rank, hashes in enumerate(mesh.gather_on_host(own)):
        for part, value in hashes.items():
            if found.setdefault(part, value) != value:
                raise UserError(
                    f"rank {rank} has another {what.format(part)} than those before it: give every "
                    "process the same"
                )
    return found


def deal_batches(batches: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """This rank's share of `batches`, as many as any rank's, perhaps with one without labels.

    So ranks with sharded exits gather them equally often.
    """
    share = deal(batches, mesh)
    if len(share) * mesh.dp < len(batches):
        share.append(without_labels(batches[0]))
    return share


def without_labels(batch: Batch) -> Batch:
    """A batch that adds nothing to losses and gradients, for a rank to keep step with others."""
    return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}


class ShardedParameter(SplitParameter):
    """A data-parallel rank's part of a trainable parameter, which may be a part itself, by --tp.

    whole_grad: the gradient of all that the ranks share, of this one's samples, until it is summed.
    """

    whole_grad: Tensor | None = None

    def together(self, values: Tensor) -> Tensor:
        """What the ranks share, of which `values` is this one's part."""
        return self.cuts[-1].gather(values)


def shard_exits(
    model: Network, mesh: Mesh, fits: Callable[[Tensor, int], bool] = lambda p, parts: True
) -> None:
    """Keep this rank's part of each trainable parameter, in place, where the ranks divide it.

    fits: whether the optimizer can work on so many parts of a parameter.
    """
    if mesh.dp == 1:
        return
    for exit in (model.exit(layer) for layer in model.exit_layers):
        for module in exit.modules():
            for name, p in module._parameters.items():
                divides = p is not None and p.requires_grad and len(p) % mesh.dp == 0
                if p is not None and divides and fits(p, mesh.dp):
                    part = split_parameter(p, 0, mesh.axis("dp"), ShardedParameter)
                    if hasattr(p, "summed"):
                        part.summed = True  # type: ignore[attr-defined]
                    module._parameters[name] = part


class GradientSum:
    """The sum of an exit's gradients over the data-parallel ranks, on its way.

    The gradients are whole, and may be used, after `wait`.
    """

    def __init__(self, exit: Exit, mesh: Mesh) -> None:
        """Starts at once; the caller goes on with other work."""
        self.works: list[Callable[[], object]] = []
        for p in exit.parameters():
            if isinstance(p, ShardedParameter):
                self._scatter(p, mesh)
            elif p.grad is not None:
                self._reduce(p, p.grad, mesh)

    def _reduce(self, p: nn.Parameter, gradient: Tensor, mesh: Mesh) -> None:
        if hasattr(p, "summed"):
            mesh.sum_over("tp", gradient)
        if mesh.dp > 1:
            work = dist.all_reduce(gradient, group=mesh.group("dp"), async_op=True)
            assert work is not None
            self.works.append(work.wait)

    def _scatter(self, p: ShardedParameter, mesh: Mesh) -> None:
        if p.whole_grad is None:
            return
        p.grad, whole = torch.empty_like(p), p.whole_grad.contiguous()
        if hasattr(p, "summed"):
            mesh.sum_over("tp", whole)
        group = mesh.group("dp")
        work = reduce_scatter(p.grad, whole, group=group, async_op=True)
        assert work is not None
        self.works.append(work.wait)
        p.whole_grad = None

    def wait(self) -> None:
        """Until the sum is there; on a GPU, let later work on it wait."""
        for wait in self.works:
            wait()
