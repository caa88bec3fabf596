"""How a layer's matrices are split over processes: by transformers' plan, or by what they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from ee_tuning.backbone.anatomy import Body, attention_name, in_memory
from ee_tuning.errors import UserError
from ee_tuning.slices import HEADS, STYLES, SUMMED

# What the families call the matrix with which an MLP or an attention writes to the residual.
WRITES_BACK = {"o_proj", "out_proj", "down_proj", "c_proj", "fc2", "dense", "dense_4h_to_h"}
ATTENTION = {"q_proj", "k_proj", "v_proj"}  # whose rows are heads, one after another


def plan_of(backbone: Body) -> dict[str, str]:
    """`layer_plan` of a backbone, which may be on the meta device, or a stage of one."""
    layer = next(filter(in_memory, backbone.layers))
    return layer_plan(backbone.config, backbone.anatomy.layers, layer)


def layer_plan(config: Any, layers: str, layer: nn.Module) -> dict[str, str]:
    """Style of each module of a layer that is split, by its path in the layer.

    From transformers' own plan for the model, where there is one: else queries, keys, values and
    what an MLP begins with are split by rows, and what writes to the residual by columns.

    layers: where the trunk keeps its layers; layer: one of them.

    Raises:
        UserError: the plan has styles of which this knows nothing; or a module cannot be split so.
    """
    whole = getattr(config, "base_model_tp_plan", None) or {}
    prefix = f"{layers}.*."
    plan = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
    unknown = sorted(set(plan.values()) - {*STYLES, SUMMED})
    if unknown:
        raise UserError(
            f"transformers' tensor-parallel plan for {config.model_type} uses "
            f"{', '.join(unknown)}: use --tp 1, with --dp or --pp"
        )
    return plan or _found(config.model_type, layer)


def _found(family: str, layer: nn.Module) -> dict[str, str]:
    """A plan by what the modules of a layer are."""

    def refuse(path: str, reason: str) -> UserError:
        return UserError(
            f"{family} cannot be split by --tp: {path} in its layers {reason}; use --tp 1, with "
            "--dp or --pp"
        )

    attention, plan = attention_name(layer), {}
    for path, module in layer.named_modules():
        own = list(module.parameters(recurse=False))
        region, _, name = path.rpartition(".")
        if not any(p.dim() >= 2 for p in own):
            if own and (region or path == attention):
                raise refuse(path, "has parameters that lie between the parts of matrices")
        elif not isinstance(module, nn.Linear):
            raise refuse(path, f"is a {type(module).__name__}")
        elif name in WRITES_BACK:
            plan[path] = "rowwise"
        elif region == attention and name not in ATTENTION:
            raise refuse(path, "is not known to be queries, keys or values alone")
        else:
            plan[path] = "colwise"
    heads, writes = layer.get_submodule(attention), [k for k, v in plan.items() if v == "rowwise"]
    if sorted(path.partition(".")[0] == attention for path in writes) != [False, True]:
        raise refuse("attention or MLP", "has not one matrix that writes to the residual")
    if {f"{attention}.{name}" for name in ATTENTION} - plan.keys():
        raise refuse(attention, "does not have queries, keys and values of its own")
    if hasattr(heads, "num_heads"):
        if not hasattr(heads, "config"):
            raise refuse(attention, "counts its heads by itself")
        plan[attention] = HEADS
    return plan
