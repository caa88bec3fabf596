"""Tiny models with exits, made once per process: tests only read them."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from ee_tuning import EarlyExitModel, ExitConfig
from helpers.families import tiny

DEPTH = 4


@cache
def early_exit(family: str = "llama", arch: str = "mlp,norm,layer") -> EarlyExitModel:
    """Exits after layers 1, 2 and 3 of a tiny model of `family`."""
    return EarlyExitModel.from_base(tiny(family), ExitConfig("1,2,3", arch=arch)).eval()


@cache
def good_exit(family: str, arch: str = "norm") -> EarlyExitModel:
    """A model whose exits agree now and then: its last layers hardly change the hidden state."""
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("2,3", arch=arch)).eval()
    for layer in list(model.backbone.layers)[2:]:
        for p in layer.parameters():
            p.data.mul_(0.3 if p.dim() >= 2 else 1)
    return model


def long_model(family: str = "llama") -> EarlyExitModel:
    """A new one with a longer context, of which several chunks can be read."""
    context = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
    base = tiny(family, **context)
    return EarlyExitModel.from_base(base, ExitConfig("1,2,3", arch="mlp,norm,layer")).eval()


def logits_from_scratch(model: EarlyExitModel, ids: Tensor, layer: int) -> Tensor:
    """Logits (1, V) after the last token, at exit `layer` or the final exit: no cache, one pass."""
    out = model(ids, output_exit_logits=True, output_logits=True)
    return (out.logits if layer == DEPTH else out.exit_logits[layer])[:, -1]
