"""Reading a backbone, or only the part of it that the exits need, and telling backbones apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ee_tuning.backbone import Backbone, find_anatomy
from ee_tuning.errors import UserError, first_line

# Values of a config that change what a model computes, whatever its weights are.
CONFIG_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps",
    "layer_norm_eps", "rope_parameters", "sliding_window", "layer_types", "tie_word_embeddings",
)  # fmt: skip
SAMPLES_PER_TENSOR = 64


def load_config(path: str) -> Any:
    """The transformers config of a local folder or a hub id.

    Raises:
        UserError: nothing is there, or it is not a decoder-only causal LM.
    """
    if not path:
        raise UserError("no backbone given: name a folder or a hub id with --model")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} is not a transformers checkpoint: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the backbone {path}: {first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{path} is an encoder-decoder model: exits need a decoder-only causal LM")
    architectures = config.architectures or ["CausalLM"]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not any(
        "CausalLM" in name or "LMHead" in name for name in architectures
    ):
        raise UserError(f"{path} is not a causal LM but {', '.join(architectures)}")
    return config


def empty_backbone(path: str) -> PreTrainedModel:
    """A causal LM without its weights, on the meta device, to look at its shapes."""
    config = load_config(path)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@dataclass(frozen=True)
class Parts:
    """What is needed of a backbone besides its norm: layers (from 1), token embedding, head."""

    layers: frozenset[int]
    embedding: bool = True
    head: bool = True


def load_backbone(
    path: str,
    parts: Parts | None = None,
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """A causal LM with only `parts` in memory; None loads all.

    A part left out is an empty placeholder: its tensors are never read from the safetensors
    files, and every other layer keeps its place and number.

    Raises:
        UserError: files missing, truncated or corrupt, tensors missing or of another shape.
    """
    config = load_config(path)
    model_class = _with_parts(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], parts, config)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot load the backbone {path}: {first_line(error)}; a file may be missing, cut "
            "short or damaged, fetch it again"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{path} lacks {len(missing)} tensors of the model, the first is {missing[0]}"
        )
    return model


def _with_parts(model_class: Any, parts: Parts | None, config: Any) -> Any:
    """`model_class`, but building empty placeholders for what is not in `parts`."""
    if parts is None:
        return model_class
    tied = config.tie_word_embeddings
    embedding = parts.embedding or (tied and parts.head)
    head = parts.head or (tied and parts.embedding)

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        anatomy = find_anatomy(self)
        owner = self.get_submodule(anatomy.trunk).get_submodule(anatomy.layers)
        for number in set(range(1, config.num_hidden_layers + 1)) - parts.layers:
            owner[number - 1] = nn.Module()  # type: ignore[operator]
        given = self.get_input_embeddings()
        paths = [path for path, module in self.named_modules() if module is given]
        for path in ([] if embedding else paths) + ([] if head else [anatomy.head]):
            self.set_submodule(path, nn.Module())

    # So that transformers neither warns of tensors left unread nor ties what is not there.
    body: dict[str, Any] = {"__init__": __init__, "_keys_to_ignore_on_load_unexpected": [r"."]}
    if not (embedding and head):
        body["_tied_weights_keys"] = {}
    return type(model_class.__name__, (model_class,), body | {"__module__": model_class.__module__})


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no tokenizer in {path}: {first_line(error)}; name one with --tokenizer"
        ) from error


def config_values(config: Any) -> dict[str, Any]:
    """The values of a backbone's config that its exits depend on: half of its fingerprint."""
    return {key: getattr(config, key, None) for key in CONFIG_KEYS}


def tensor_hashes(backbone: Backbone, deepest: int) -> dict[str, str]:
    """A hash per part of a backbone up to layer `deepest`: the other half of its fingerprint.

    Over the tensors' names, shapes and `SAMPLES_PER_TENSOR` values of each, rounded to bf16 so
    that the dtype a checkpoint is loaded in makes no difference. Deeper layers are not covered:
    they need not be in memory. Nor are parts that another stage of a pipeline holds.
    """
    parts = {"embedding": backbone.model.get_input_embeddings(), "final norm": backbone.norm}
    layers = list(backbone.layers)[:deepest]  # type: ignore[call-overload]
    parts |= {f"layer {number}": layer for number, layer in enumerate(layers, start=1)}
    return {name: _hash_tensors(part) for name, part in parts.items() if in_memory(part)}


def in_memory(module: nn.Module) -> bool:
    """Whether `module` is there, and not a placeholder of `load_backbone`."""
    return any(True for _ in module.parameters())


def _hash_tensors(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, p in module.named_parameters():
        flat = p.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, SAMPLES_PER_TENSOR, dtype=torch.float64)
        sample = flat[places.long().to(flat.device)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(p.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def check_same(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Refuse a backbone that the exits in `where` were not made for.

    Raises:
        UserError: names the first value of a fingerprint that differs.
    """
    for key, value in expected.items():
        other = found.get(key)
        if value != other:
            raise UserError(
                f"the exits in {where} were made for another backbone: "
                f"{key} is {other!r} here and {value!r} there"
            )
