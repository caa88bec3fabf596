"""The draft exit: where it sits, how it begins, its unrolled steps against a slow obvious twin."""

import pytest
import torch
from helpers.families import MOE, tiny
from transformers import DynamicCache

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.exit_config import ExitSpec

FAMILIES = [
    "llama", "llama-tied-bias", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "granite",
    "mistral", "biogpt", "olmo2", "falcon-new",
]  # fmt: skip
IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))
PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3], [0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5]])
STEPS = 4


def noisy(family="llama", seed=1, **settings):
    """A draft exit on a tiny model, with every weight random."""
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("", "draft", **settings))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.draft.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    model.draft.steps = STEPS
    return model


# -- which there are -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "depth", "expected"),
    [
        (ExitConfig("", "draft"), 30, (3, 15, 25, 30)),
        (ExitConfig(0, ["draft"]), 4, (1, 2, 3, 4)),
        (ExitConfig("0", "draft"), 1, (1,)),
        (ExitConfig("0", "draft", sources="3,1/2,1"), 8, (1, 3, 4)),
        (ExitConfig("", "draft", sources=[8]), 8, (8,)),
    ],
)
def test_sources_are_given_or_low_middle_and_high(config, depth, expected):
    assert config.specs(depth) == [ExitSpec(0, "draft", "shared", expected)]


def test_a_draft_exit_comes_after_those_at_layers():
    specs = ExitConfig("0,3,1", "draft,mlp,layer", head="own,auto,shared").specs(4)
    assert [(s.layer, s.arch, s.head) for s in specs] == [
        (1, "layer", "shared"), (3, "mlp", "own"), (0, "draft", "own"),
    ]  # fmt: skip
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("0,1,3", "draft,norm,norm"))
    assert model.exit_layers == model.all_exit_layers == [1, 3, 0]
    assert model.draft is model.exit(0)
    assert model.stage == range(4)
    assert EarlyExitModel.from_base(tiny("llama"), ExitConfig("1")).draft is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExitConfig("0,2", "mlp"), "exit layer 0 is a draft exit's, and arch is mlp"),
        (ExitConfig("2", "draft"), "a draft exit sits at no layer, and 2 is given"),
        (ExitConfig("0,2", "draft"), "a draft exit sits at no layer, and 2 is given"),
        (ExitConfig("0,0", "draft"), "exit layer 0 is given twice"),
        (ExitConfig("", "draft", sources="2,5"), "source layer 5 does not exist"),
        (ExitConfig("", "draft", sources="0"), "source layer 0 does not exist"),
        (ExitConfig("", "draft", sources="2,2"), "source layer 2 is given twice"),
        (ExitConfig("", "draft", sources="x"), "source layer 'x' is not understood"),
        (ExitConfig("2", "mlp", sources="1"), "draft_sources is for a draft exit"),
    ],
)
def test_drafts_that_cannot_be(config, message):
    with pytest.raises(UserError, match=message) as found:
        config.specs(4)
    assert "\n" not in str(found.value)


# -- how it begins -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copied_draft_is_the_last_layer_on_the_normalised_high_state_and_token(family):
    """The state of the token before; exactly, but for the products with zeros and ones."""
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("", "draft"))
    backbone, draft = model.backbone, model.draft
    found = model(IDS, output_exit_logits=True).exit_logits[0]
    high = model.chain.descend(IDS).to(0).sources[-1]
    shifted = torch.cat([torch.zeros_like(high[:, :1]), high[:, :-1]], 1)
    positions = torch.arange(11).expand(2, -1)
    token = draft.embed_norm(backbone.embedding()(IDS, positions).hidden)
    entering = token + draft.source_norms[-1](shifted)
    last = backbone.segment(3, 4)(entering, positions).hidden
    assert torch.allclose(found, backbone.final_logits(last), atol=1e-4)
    norms = draft.embed_norm, draft.chain_norm, *draft.source_norms
    assert all(torch.equal(norm(high), norms[0](high)) for norm in norms)


def test_a_random_draft_is_reproducible():
    one, same, other = (
        EarlyExitModel.from_base(tiny("llama"), ExitConfig("", "draft", init="random", seed=seed))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(p, same.exit_state()[n]) for n, p in one.exit_state().items())
    assert not torch.equal(one.draft.first.weight, other.draft.first.weight)
    assert one.draft.later.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_embedded_as_the_first_layer_gets_them(family):
    model, found = tiny(family), []
    draft = EarlyExitModel.from_base(model, ExitConfig("", "draft"))
    layer = draft.backbone.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model(IDS)
    hook.remove()
    embedded = draft.draft.embedding(IDS, torch.arange(11).expand(2, -1)).hidden
    assert torch.equal(embedded, found[0])


# -- a slow, obvious twin --------------------------------------------------------------------------


def chain_by_chain(model, ids, start):
    """The chain that begins at token `start` of one text (1, T), as decoding runs it: the settled
    tokens one after another from the backbone's states, then its own; features (H,) of each."""
    draft, found = model.draft, []
    states = torch.cat(model.chain.descend(ids).to(0).sources, dim=-1)
    cache = DynamicCache(config=model.config)  # the block's K/V, at the last layer's number
    last = torch.zeros_like(states[:, :1])
    for place in range(min(start + STEPS, ids.shape[1])):
        step = draft.first_step if place <= start else draft.later_step
        last = h = step(ids[:, place : place + 1], last, torch.tensor([[place]]), cache)
        if place < start:
            last = states[:, place : place + 1]
        else:
            found.append(draft.norm(h)[0, 0])
    return found


def texts(positions):
    """The (row, first, last + 1) of each text in packed positions (B, T)."""
    for row, line in enumerate(positions.tolist()):
        starts = [i for i, p in enumerate(line) if p == 0]
        yield from ((row, *pair) for pair in zip(starts, [*starts[1:], len(line)], strict=True))


@pytest.mark.parametrize("family", [*FAMILIES, *MOE])
def test_unrolled_steps_are_single_steps_with_a_cache(family):
    """Every draft of every chain in packed texts. Tolerance: sums in another order, 1e-4."""
    model = noisy(family)
    with torch.no_grad():
        found = model.draft.predictions(model.chain.descend(IDS, PACKED).to(0))
        assert len(found) == STEPS
        compared = 0
        for row, first, stop in texts(PACKED):
            ids = IDS[row : row + 1, first:stop]
            for start in range(stop - first):
                for step, expected in enumerate(chain_by_chain(model, ids, start)):
                    features = found[step][row, first + start + step]
                    assert torch.allclose(features, expected, atol=1e-4), (row, start, step)
                    compared += 1
    # Of a text of n tokens, step j has n − j chains.
    assert compared == sum(max(0, b - a - j) for _, a, b in texts(PACKED) for j in range(STEPS))


def test_padded_texts_have_the_drafts_that_they_have_alone():
    model, mask = noisy(), torch.ones_like(IDS)
    mask[0, 6:] = mask[1, :4] = 0
    padded = model(IDS, mask, output_exit_logits=True).exit_logits[0]
    for row, place in enumerate((slice(6), slice(4, 11))):
        alone = model(IDS[[row], place], output_exit_logits=True).exit_logits[0][0]
        torch.testing.assert_close(padded[row, place], alone, rtol=1e-4, atol=1e-4)
