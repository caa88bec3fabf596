"""The one trick everything here rests on: run transformers' own code with some parts replaced.

A *twin* of a module shares all its tensors and runs its own ``forward``, but sees other
submodules at some places. A segment is a twin of the backbone with fewer layers, an exit's
output path is a twin of the causal LM with another head, an `mlp` exit is a twin of one layer
with another MLP. So masks, rotary tables, scalings and attention kernels stay transformers'.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import nn


def twin(module: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy of `module` with the submodules at the dotted paths in `parts` replaced.

    The original is left as it is, hooks on it are not taken along, and no tensor is copied.
    """
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    copied._forward_hooks = OrderedDict()
    copied._forward_hooks_with_kwargs = OrderedDict()
    copied._forward_pre_hooks = OrderedDict()
    copied._forward_pre_hooks_with_kwargs = OrderedDict()
    for path, part in parts.items():
        head, _, rest = path.partition(".")
        child = copied._modules[head]
        assert child is not None, f"{type(module).__name__} has no part {path}"
        copied._modules[head] = twin(child, {rest: part}) if rest else part
    return copied
