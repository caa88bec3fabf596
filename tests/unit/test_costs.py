"""What parts weigh and compute, against torch's own counter and the numbers of a few models."""

import pytest
import torch
from helpers.families import FAMILIES, MOE, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.costs import draft_cost, runs_side_by_side, state_bytes, work
from ee_tuning.losses import cross_entropy
from ee_tuning.quantise.fp8 import freeze_in_fp8

LENGTH = 16
IDS = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 90 + 3
LABELS = IDS % 50
POSITIONS = torch.arange(LENGTH).expand_as(IDS)
# There attention reads hidden states through no norm that is tuned: no gradient goes to its input.
NO_NORM_BEFORE = {"olmo", "olmo2"}
QKV = ("q_proj", "k_proj", "v_proj")


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
        descent = model.chain.descend(IDS, POSITIONS)
        for layer in model.exit_layers:
            exit = model.exit(layer)
            logits = exit.output.known_logits(exit.features(descent.to(layer)))
            if logits.requires_grad:
                cross_entropy(logits, LABELS).total.backward()
    return counter.get_total_flops() / IDS.numel()


def expected(model):
    return sum(work(model, 2 * LENGTH).tuning())


@pytest.mark.parametrize("arch", ["embedding", "norm", "mlp", "layer"])
@pytest.mark.parametrize("family", [*FAMILIES, *MOE])
def test_work_is_what_torch_counts(family, arch):
    """But for the rotary tables, which torch counts as products, too."""
    if arch == "mlp" and family in MOE:
        pytest.skip("refused")
    model = EarlyExitModel(plain(family), ExitConfig("2,3", arch))
    found = expected(model)
    if arch == "layer" and family in NO_NORM_BEFORE:
        read = sum(p.numel() for n, p in model.exits.named_parameters() if n.split(".")[-2] in QKV)
        found -= 2 * read
    assert counted(model) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("known", [0, 50])
@pytest.mark.parametrize("head", ["own", "shared"])
@pytest.mark.parametrize("arch", ["embedding", "norm", "mlp", "layer"])
def test_heads_are_counted_as_torch_does(arch, head, known):
    """Those of reduced vocabularies: the same before and after rows are picked."""
    model = EarlyExitModel(plain("llama"), ExitConfig("2,4", arch, head=head))
    planned = work(model, 2 * LENGTH, known)
    if known:
        model.reduce_vocabulary(torch.arange(known))
    assert work(model, 2 * LENGTH) == planned
    assert counted(model) == pytest.approx(sum(planned.tuning()), rel=1e-3)
    tuned = sum(p.numel() for p in model.exits.parameters() if p.requires_grad)
    assert sum(exit.whole.values for exit in planned.exits.values()) == tuned


def test_the_numbers_of_two_small_models():
    """By hand, at 64 tokens: of the MLP's three matrices two need no gradient of their input; of
    four experts, a token takes two, and the router."""
    hidden, length, inner, head = 32, 64, 48, 96 * 32
    attention = 3 * hidden * hidden + 2 * length * hidden / 2
    mlp = EarlyExitModel(tiny("llama"), ExitConfig("2", "mlp"))
    layer = 2 * (attention + 3 * hidden * inner)
    exit = (4 + 4 + 6) * hidden * inner
    assert sum(work(mlp, length).tuning()) == 2 * layer + exit + 6 * head == 78_848
    experts = EarlyExitModel(tiny("mixtral"), ExitConfig("2", "norm"))
    layer = 2 * (attention + 2 * 3 * hidden * inner + 4 * hidden)
    assert sum(work(experts, length).tuning()) == 2 * layer + 6 * head == 76_288


def test_a_draft_of_a_mixture_of_experts_costs_its_active_experts():
    model = EarlyExitModel(tiny("mixtral"), ExitConfig("2", "norm"))
    layer = 3 * 32 * 32 + 2 * 3 * 32 * 48 + 4 * 32
    head = 96 * 32
    assert draft_cost(model, 2) == (2 * layer + head) / (4 * layer + head)
    assert work(model).layers[0].values > 3 * 32 * 32 + 4 * 3 * 32 * 48


@pytest.mark.parametrize("length", [1, 4, 6, 16])
def test_a_window_bounds_what_a_token_sees(length):
    """Of `length` tokens a token sees half, and no more than its window."""
    model = EarlyExitModel(tiny("gemma3"), ExitConfig("4", "norm"))
    slides, sees_all = (one.forward for one in work(model, length).layers[:2])
    products = work(model).layers[0].forward
    assert sees_all - products == 2 * length * 32
    pairs = sum(min(i + 0.5, 6) for i in range(length))
    assert slides - products == pytest.approx(4 * 32 * pairs / length)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_shapes_are_enough(family):
    """On the meta device, and where weights are kept in another form."""
    model = EarlyExitModel(tiny(family), ExitConfig("2,4", "norm"))
    found = work(model, LENGTH)
    with torch.device("meta"):
        shapes = EarlyExitModel(AutoModelForCausalLM.from_config(model.config), model.exit_config)
    assert work(shapes, LENGTH) == found
    for layer in model.backbone.layers:
        freeze_in_fp8(layer)
    assert work(model, LENGTH).tuning() == found.tuning()


def test_micro_batches_go_side_by_side_where_gradients_weigh_more():
    """Three states of a token for one exit at a time, or for all of them with a teacher."""
    assert state_bytes(10, 64, 4, needs_teacher=False) == 3 * 10 * 64
    assert state_bytes(10, 64, 4, needs_teacher=True) == 4 * 3 * 10 * 64
    assert runs_side_by_side(300, [100, 200, 200])
    assert not runs_side_by_side(301, [100, 200, 200])
    assert not runs_side_by_side(1, [100])
    assert not runs_side_by_side(1, [])
