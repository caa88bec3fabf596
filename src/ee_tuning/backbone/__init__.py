"""The backbone: a dense decoder-only causal LM of transformers, taken apart and cut into segments.

`families` has what the generic path cannot see, `anatomy` finds the parts, `positions` knows how
long texts may be, `splits` how processes split a layer, `segment` runs a slice of the layers, and
`backbone` puts them together.
"""

from ee_tuning.backbone.anatomy import (
    Anatomy,
    attention_name,
    check_merged,
    check_unquantised,
    find_anatomy,
    in_memory,
    mlp_names,
    slice_config,
)
from ee_tuning.backbone.backbone import Backbone
from ee_tuning.backbone.families import FAMILIES, Family
from ee_tuning.backbone.segment import Call, Segment, State
from ee_tuning.backbone.splits import WRITES_BACK, layer_plan, plan_of

__all__ = [
    "FAMILIES",
    "WRITES_BACK",
    "Anatomy",
    "Backbone",
    "Call",
    "Family",
    "Segment",
    "State",
    "attention_name",
    "check_merged",
    "check_unquantised",
    "find_anatomy",
    "in_memory",
    "layer_plan",
    "mlp_names",
    "plan_of",
    "slice_config",
]
