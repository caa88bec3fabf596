"""Logits of a text that is computed in windows, alone or beside others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.wanted import Wanted, Window
from helpers.families import tiny

# What vector units compute at a time divides these, so that no element is computed by itself.
SIZES = {"hidden_size": 64, "intermediate_size": 128}
OTHER_SIZES = {
    "gpt2": {"n_embd": 64, "n_inner": 128},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
}


def wide(
    family: str, dtype: torch.dtype, device: str = "cpu", arch: str = "norm", **overrides
) -> EarlyExitModel:
    """A tiny model whose sizes are multiples of 64, and an exit after its second layer."""
    sizes = OTHER_SIZES.get(family, SIZES) | overrides
    base = tiny(family, seed=1, **sizes).to(device, dtype)
    return EarlyExitModel.from_base(base, ExitConfig("2", arch=arch)).eval()


def logits(
    model: EarlyExitModel,
    ids: Sequence[int],
    cuts: Sequence[int],
    rows: int = 1,
    capacity: int = 64,
    compile: bool = False,
    exits: Sequence[int] = (),
) -> Tensor:
    """(T, V) of the text `ids` that is computed in windows of `cuts` tokens, in the last of `rows`
    slots; in the others are texts of which every token is one more. exits: the layer of the one
    that is asked, none: the final exit."""
    sizes = {"slots": rows, "capacity": capacity, "longest": max(cuts)}
    passes = Passes(model, exits, **sizes, compile=compile)
    assert passes.invariant.missing is None
    found, start = [], 0
    for count in cuts:
        some = ids[start : start + count]
        windows = [
            Window(row, count, [(i + 1) % 96 if row < rows - 1 else i for i in some])
            for row in range(rows)
        ]
        said = passes.window(0, windows, [start] * rows, Wanted("each", not exits))
        assert said is not None
        found.append(said.logits[rows - 1, :count].clone())
        start += count
    return torch.cat(found)
