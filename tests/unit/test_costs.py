"""What parts weigh and compute, against torch's own counter and the numbers of a few models."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, MOE, tiny
from torch.utils.flop_counter import FlopCounterMode

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.costs import draft_cost, runs_side_by_side, state_bytes, work
from ee_tuning.fp8 import freeze_in_fp8
from ee_tuning.losses import cross_entropy

LENGTH = 16
IDS = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 90 + 3
LABELS = IDS % 50
# Attention reads hidden states there without a norm of parameters, so its own weights alone have
# gradients.
NO_NORM_BEFORE = {"olmo", "olmo2"}


def plain(family):
    """A model whose products torch's counter knows, and whose windows slide over nothing."""
    windows = {"mistral", "starcoder2", "gemma2", "gemma3", "gpt_oss"}
    wide = {"sliding_window": 64} if family in windows else {}
    return tiny(family, attn_implementation="eager", experts_implementation="eager", **wide)


def counted(model):
    """FLOP per token of one forward and backward pass, by torch.

    Of the whole square of attention, of which half is masked: as of a text of twice the length.
    """
    with FlopCounterMode(display=False) as counter:
        for layer, state in model.states(IDS):
            exit = model.exit(layer)
            logits = exit.known_logits(exit.features(state))
            if logits.requires_grad:
                cross_entropy(logits, LABELS).total.backward()
    return counter.get_total_flops() / IDS.numel()


def expected(model):
    return sum(work(model, 2 * LENGTH).tuning())


@pytest.mark.parametrize("arch", ["embedding", "norm", "mlp", "layer"])
@pytest.mark.parametrize("family", [*FAMILIES, *MOE])
def test_work_is_what_torch_counts(family, arch):
    """But for the rotary tables, which it counts as products, too."""
    if arch == "mlp" and family in MOE:
        pytest.skip("refused")
    model = EarlyExitModel(plain(family), ExitConfig("2,3", arch))
    print(counted(model), expected(model))
    assert counted(model) == pytest.approx(expected(model), rel=1e-3)
