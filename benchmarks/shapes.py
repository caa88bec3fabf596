"""Models of well-known shapes with random weights, made directly on the device they run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.quantise.fp8 import freeze_in_fp8
from ee_tuning.quantise.packages import quantise_layer
from ee_tuning.share import shares_head

SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000,
    },
    "llama2-13b": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "vocab_size": 32000,
    },
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama2-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "160m": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "vocab_size": 512,
    },
}  # fmt: skip


def build(
    shape: str,
    exits: ExitConfig,
    device: torch.device,
    dtype: torch.dtype,
    fp8: bool,
    stage: range | None = None,
    precision: str = "same",
) -> EarlyExitModel:
    """A random model of `shape` with `exits`, as deep as the deepest exit, or a `stage` of it.

    Layer by layer, so that a quantised backbone never takes more than that and one layer. Each
    part's weights come from a seed of its own: they are the same in every stage. fp8, or else
    precision: as `--backbone-precision` has it.
    """
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = EarlyExitModel(backbone, exits, stage)
    for layer in model.exit_layers:
        fill(model.exit(layer).float(), device, 1000 + layer)
    layers = model.backbone.layers
    owner = model.backbone.trunk.get_submodule(model.backbone.anatomy.layers)
    for number, layer in enumerate(layers):
        if number not in model.stage:
            owner[number] = nn.Module()  # type: ignore[operator]
            continue
        fill(layer, device, number)
        if fp8:
            freeze_in_fp8(layer)
        elif precision not in ("same", "fp8"):
            quantise_layer(layer, precision, dtype)
    if model.stage.start:
        backbone.set_input_embeddings(nn.Module())
    else:
        fill(backbone.get_input_embeddings(), device, 2000)
    fill(model.backbone.norm, device, 2001)
    if not config.tie_word_embeddings:
        fill(model.backbone.head, device, 2002)
    elif model.stage.start:
        fill(model.backbone.head, device, 2000)
    else:
        model.backbone.head.weight = backbone.get_input_embeddings().weight
    if fp8 and shares_head(model):
        freeze_in_fp8(model.backbone.head, backward=True)
    rotary = model.backbone.trunk.rotary_emb
    for name, buffer in type(rotary)(config).to(device).named_buffers():
        rotary.register_buffer(name, buffer, persistent=False)
    return model


def fill(module: nn.Module, device: torch.device, seed: int) -> None:
    """Give a module that was built on ``meta`` random matrices and norms of 1 on `device`."""
    module.to_empty(device=device)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.02)
            else:
                p.fill_(1)
