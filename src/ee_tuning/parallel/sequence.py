"""Sequence parallelism: between split products a process has its part of the positions only.

Norms and residuals work on (B, T/tp, H). What a layer's plan splits lies in a *region*, attention
or MLP, which begins by gathering the positions and ends by summing its parts' terms, of which a
process keeps those of its positions. Both together send as much as one sum without this.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ee_tuning.backbone import Segment
from ee_tuning.collectives import Group, gathered, used_apart
from ee_tuning.errors import UserError
from ee_tuning.slices import HEADS, SEQUENCE


class SequencePart:
    """Which positions of a sequence are this process's: as many as any other's."""

    def __init__(self, mesh: DeviceMesh) -> None:
        """mesh: the processes of the tp axis."""
        self.group, self.size = Group.of(mesh), mesh.size()

    def own(self, x: Tensor) -> Tensor:
        """(B, T, H) → (B, T/tp, H)."""
        return self.group.own(x, SEQUENCE).contiguous()

    def gather(self, x: Tensor, terms: bool = False) -> Tensor:
        """(B, T/tp, H) → (B, T, H). terms: of its gradient, each process will have a term."""
        return gathered(x, self.group, SEQUENCE, terms)

    def shared(self, x: Tensor) -> Tensor:
        """x (B, T, H), the same on each process, of whose gradient each will have a term."""
        return used_apart(x, self.group)

    def prepare(self, segment: Segment) -> None:
        """Let the layers of `segment` see this process's positions; its mask and positions are
        whole.

        Its trunk makes these from what it is given: token ids, or a tensor of the shape alone.
        """
        given: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = kwargs.get("inputs_embeds")
            if hidden is None:
                return None
            given.append(hidden)
            size = (*kwargs["position_ids"].shape, hidden.shape[-1])
            return args, kwargs | {"inputs_embeds": hidden.new_zeros(()).expand(size)}

        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = given.pop() if given else self.own(args[0])
            return (hidden, *args[1:]), kwargs

        segment.trunk.register_forward_pre_hook(keep, with_kwargs=True)
        # Before those that record how a layer was called.
        segment.layers[0].register_forward_pre_hook(take, with_kwargs=True, prepend=True)


def regions(plan: dict[str, str]) -> set[str]:
    """The children of a layer in which its tensor-parallel plan splits something.

    Raises:
        UserError: a child itself is split, so that there is no place to gather before it.
    """
    plan = {name: style for name, style in plan.items() if style != HEADS}
    bare = sorted(name for name in plan if "." not in name)
    if bare:
        raise UserError(
            f"--sequence-parallel needs layers that split within attention and MLP only, "
            f"{', '.join(bare)} lies outside: leave it out"
        )
    return {name.partition(".")[0] for name in plan}


def gather_before(region: nn.Module, part: SequencePart) -> None:
    """Let `region` begin by gathering the positions of its hidden states."""

    def gather(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (part.gather(args[0], terms=True), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": part.gather(kwargs["hidden_states"], terms=True)}

    region.register_forward_pre_hook(gather, with_kwargs=True)
