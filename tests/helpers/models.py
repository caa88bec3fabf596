"""Tiny models with exits, made once per process: tests only read them."""

from __future__ import annotations

from functools import cache

import torch
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


@cache
def drafting(family: str = "llama", vocabulary: int = 0) -> EarlyExitModel:
    """A tiny model whose draft exit is right now and then: its layers change little.

    family: "eagle3" is a llama with an exit of that architecture, right where a text repeats
    itself. vocabulary: how many tokens the exit knows; 0: all.
    """
    if family == "eagle3":
        return eagle3(vocabulary)
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("0", arch="draft")).eval()
    for layer in [*model.backbone.layers, model.draft.block]:
        for p in layer.parameters():
            p.data.mul_(0.05 if p.dim() >= 2 else 1)
    generator = torch.Generator().manual_seed(1)
    for linear in (model.draft.first, model.draft.later):
        linear.weight.data = 0.05 * torch.randn(linear.weight.shape, generator=generator)
        linear.weight.data[:, :32].fill_diagonal_(1.0)
    if vocabulary:
        model.reduce_vocabulary(torch.randperm(96, generator=generator)[:vocabulary].sort().values)
    return model


def eagle3(vocabulary):
    config = ExitConfig("0", arch="eagle3", sources="1,2,4")
    model = EarlyExitModel.from_base(tiny("llama"), config).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.draft.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    if vocabulary:
        model.reduce_vocabulary(torch.arange(96 - vocabulary, 96))
    return model
