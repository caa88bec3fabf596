"""Where a causal LM keeps its parts, found by what they are and not by what they are called."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ee_tuning.backbone.families import FAMILIES, Family
from ee_tuning.backbone.positions import Positions
from ee_tuning.errors import UserError


@dataclass(frozen=True)
class Anatomy:
    """Where a causal LM keeps its parts: dotted paths from the model, or from the trunk.

    The *trunk* is the module that owns the layers and runs them.
    """

    trunk: str
    layers: str
    norm: str
    head: str


def check_unquantised(config: Any, name: str) -> None:
    """Refuse a backbone whose weights are stored or loaded quantised.

    Raises:
        UserError: how it is quantised, and what to use instead.
    """
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise UserError(
            f"{name} is quantised ({getattr(method, 'value', method)}), and exits start from full "
            "precision: give the checkpoint it was made from, with --backbone-precision bnb-4bit, "
            "say, if memory is short"
        )


def check_merged(model: PreTrainedModel) -> None:
    """Refuse a model with an adapter of PEFT in its layers.

    Raises:
        UserError: says what to do.
    """
    if any("base_layer" in module._modules for module in model.modules()):  # faster than hasattr
        raise UserError(
            f"{type(model).__name__} has an adapter of PEFT in its layers: exits want both in one, "
            "which merge_and_unload of a PeftModel gives"
        )


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a causal LM by what they are, not by what they are called.

    Raises:
        UserError: the model is an encoder-decoder, has no output head, its layers or final norm
            are not where a decoder-only model has them, or some layers are recurrent.
    """
    config = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder model: exits need a decoder-only causal LM")
    check_unquantised(config, name)
    check_merged(model)
    head = model.get_output_embeddings()
    if head is None or not hasattr(config, "num_hidden_layers"):
        raise UserError(f"{name} is not a causal LM: it has no output head over a vocabulary")
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not lists:
        raise UserError(f"{name} has no list of {config.num_hidden_layers} decoder layers")
    trunk, _, layers = lists[0].rpartition(".")
    norms = [
        path
        for path, module in model.get_submodule(trunk).named_children()
        if "norm" in type(module).__name__.lower()
    ]
    if not norms:
        raise UserError(f"{name} has no final norm after its layers: exits need a pre-norm model")
    caches = DynamicCache(config=config).layers
    if model._is_stateful or any(isinstance(c, LinearAttentionCacheLayerMixin) for c in caches):
        raise UserError(
            f"{name} has layers that carry a state from token to token: exits need attention "
            "alone, whose K/V can be filled in later and taken back"
        )
    heads = [path for path, module in model.named_modules() if module is head]
    return Anatomy(trunk, layers, norms[-1], heads[0])


class Body(Positions):
    """A frozen causal LM of transformers taken apart.

    Raises:
        UserError: see `find_anatomy`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.anatomy = find_anatomy(model)
        self.family = FAMILIES.get(model.config.model_type, Family())
        self.trunk = model.get_submodule(self.anatomy.trunk)
        self.norm = self.trunk.get_submodule(self.anatomy.norm)
        self.head = model.get_submodule(self.anatomy.head)

    @property
    def layers(self) -> list[nn.Module]:
        """Every layer, or a placeholder where it was left out of memory; counted from 0."""
        return list(self.trunk.get_submodule(self.anatomy.layers).children())

    @property
    def num_layers(self) -> int:
        """Depth L of the backbone, whether or not every layer is in memory."""
        return self.config.num_hidden_layers

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the backbone's weights."""
        return self.model.dtype


def slice_config(config: Any, kept: Sequence[int]) -> Any:
    """`config` for a trunk that owns only the layers `kept`, counted from 0."""
    sliced = copy.copy(config)
    sliced.num_hidden_layers = len(kept)
    for name, value in vars(config).items():
        per_layer = isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
        if per_layer and not name.endswith(("token_id", "architectures")):
            setattr(sliced, name, [value[layer] for layer in kept])
    return sliced


def attention_name(layer: nn.Module) -> str:
    """The name of a layer's attention."""
    names = [n for n, m in layer.named_children() if "attention" in type(m).__name__.lower()]
    if not names:
        raise UserError(f"{type(layer).__name__} has no attention: mlp exits cannot be added to it")
    return names[0]


def mlp_names(layer: nn.Module) -> list[str]:
    """The names of what makes up a layer's MLP: its children with matrices, attention aside.

    Raises:
        UserError: the MLP is a mixture of experts.
    """
    attention = attention_name(layer)
    names = [
        name
        for name, child in layer.named_children()
        if name != attention and any(p.dim() >= 2 for p in child.parameters())
    ]
    if any(
        "expert" in path for name in names for path, _ in layer.get_submodule(name).named_modules()
    ):
        raise UserError(
            f"{type(layer).__name__} is a mixture of experts: mlp exits need a dense MLP; "
            "use norm, layer or embedding"
        )
    return names


def in_memory(module: nn.Module) -> bool:
    """Whether `module` is there, and not a placeholder of `ee_tuning.loading.load_backbone`."""
    return type(module) is not nn.Module
