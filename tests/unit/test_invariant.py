"""What a token's numbers are does not depend on what is computed beside it: the same bits."""

import pytest
import torch
from helpers.families import tiny
from helpers.models import good_exit
from helpers.prompts import prompt
from helpers.windows import logits, wide
from torch import nn

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.invariant import Invariant
from ee_tuning.invariant.products import Weights, products

# Plain; soft-capped, with windows; transposed weights; biases, a tied head; windows, LayerNorm.
FAMILIES = ["llama", "gemma2", "gpt2", "llama-tied-bias", "starcoder2", "qwen3"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_has_the_same_bits_in_every_window_and_beside_others(family, dtype):
    model, ids = wide(family, dtype), prompt(40, 1)
    alone = logits(model, ids, [1] * 40)
    assert torch.equal(logits(model, ids, [5] * 8), alone)
    assert torch.equal(logits(model, ids, [2, 3, 4, 7, 8, 9, 1, 6], capacity=50), alone)
    assert torch.equal(logits(model, ids, [1] * 40, rows=3), alone)
    assert torch.equal(logits(model, ids, [5] * 8, rows=4), alone)


@pytest.mark.parametrize("heads", [(2, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_token_has_the_same_bits_whichever_thread_computes_it(family, heads):
    """Texts of more than the places that are looked at together, heads that share K/V or do not."""
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 16}
    sizes["hidden_size"] = 16 * heads[0]
    window = {"sliding_window": 70} if family == "mistral" else {}
    sizes |= {"max_position_embeddings": 256, **window}
    model, ids = wide(family, torch.float32, **sizes), prompt(90, 1)
    alone = logits(model, ids, [1] * 90, capacity=90)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(logits(model, ids, [5] * 18, capacity=90), alone)
            assert torch.equal(logits(model, ids, [6] * 15, rows=5, capacity=200), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_order_of_sums_is_all_that_differs_from_transformers(family):
    """fp32, where another order changes a number by no more than this."""
    model, ids = wide(family, torch.float32), prompt(40, 1)
    with torch.inference_mode():
        whole = model.backbone.model(torch.tensor([ids])).logits[0]
    assert torch.allclose(logits(model, ids, [5] * 8), whole, atol=1e-5, rtol=1e-4)


def test_speculative_texts_are_full_depths_in_half_precision():
    model = good_exit.__wrapped__("llama").to(torch.bfloat16)
    drafted = kept = 0
    for seed in range(40):
        ids = torch.tensor([prompt(6, seed)])
        common = {"max_new_tokens": 24, "eos_token_id": None}
        full = model.generate(input_ids=ids, mode="full", **common)
        drafts = model.generate(input_ids=ids, mode="speculative", threshold=0.0, **common)
        assert torch.equal(drafts.sequences, full.sequences)
        kept += (drafts.exit_layers < 4).sum().item()
        drafted += drafts.exit_layers.numel()
    assert 0.05 < kept / drafted < 0.95  # some drafts are kept, some are not


def test_texts_do_not_depend_on_their_neighbours_in_half_precision():
    model = good_exit.__wrapped__("llama").to(torch.bfloat16)
    common = {"max_new_tokens": 16, "eos_token_id": None, "mode": "full"}
    prompts = [{"input_ids": prompt(3 + i, i)} for i in range(9)]
    alone = {
        i: model.generate(input_ids=torch.tensor([one["input_ids"]]), **common).sequences[0]
        for i, one in enumerate(prompts)
    }
    for slots in (2, 5):
        for i, out in model.generate_batch(prompts, slots=slots, **common):
            assert torch.equal(out.sequences[0], alone[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_layers(dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(64, n, bias=n != 32).to(dtype) for n in (64, 32, 128)]
    x = torch.randn(2, 3, 64, dtype=dtype)
    before = [layer.weight.clone() for layer in layers]
    with torch.inference_mode():
        for layer, product in zip(layers, products(layers), strict=True):
            # One rounding of a half: 2⁻⁸.
            tolerance = 1e-5 if dtype == torch.float32 else 2**-7
            assert torch.allclose(product(x), layer(x), atol=tolerance, rtol=tolerance)
    assert all(torch.equal(a, layer.weight) for a, layer in zip(before, layers, strict=True))


def test_products_of_layers_that_are_given_different_inputs_are_their_own():
    torch.manual_seed(0)
    a, b = layers = [nn.Linear(64, 64), nn.Linear(64, 64)]
    x, y = torch.randn(2, 5, 64)
    with torch.inference_mode():
        first, second = products(layers)
        pairs = [(first, x, a), (second, y, b), (second, x, b), (first, y, a), (first, x, a)]
        for product, given, layer in pairs:
            assert torch.allclose(product(given), layer(given), atol=1e-5)


def test_without_room_for_copies_products_are_the_same(monkeypatch):
    """Only the order in which the weights lie is another."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.Linear(64, 128)]
    x = torch.randn(2, 3, 64)
    monkeypatch.setattr("ee_tuning.invariant.products.free_memory", lambda _: 1)
    with torch.inference_mode():
        for layer, product in zip(layers, products(layers), strict=True):
            assert product.weights.matrix.data_ptr() == layer.weight.data_ptr()
            whole = product(x)
            assert torch.allclose(whole, layer(x), atol=1e-5)
            assert torch.equal(product(x[:1, 1:2]), whole[:1, 1:2])


def test_products_are_made_once_however_little_room_is_left(monkeypatch):
    layers = [nn.Linear(64, 64), nn.Linear(64, 128)]
    before = products(layers)
    monkeypatch.setattr("ee_tuning.invariant.products.free_memory", lambda _: 1)
    assert [one.weights for one in products(layers)] == [one.weights for one in before]


def test_weights_that_changed_are_read_anew():
    layer, x = nn.Linear(64, 64), torch.randn(3, 64)
    with torch.inference_mode():
        before = products([layer])[0](x)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)
    with torch.inference_mode():
        after = products([layer])[0](x)
    assert torch.allclose(after, 2 * before, atol=1e-5)
    assert Weights([layer], packed=True).sizes == [64]


@pytest.mark.parametrize(
    ("family", "compiled", "reason"),
    [
        ("mixtral", False, "multiplies in its own way"),
        ("falcon", False, "attends by itself"),
        ("llama", True, "compiled for a CPU"),
        ("llama", False, None),
    ],
)
def test_what_cannot_be_had_is_said(family, compiled, reason):
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("1", arch="norm"))
    missing = Invariant(model.backbone, compiled).missing
    assert missing is None if reason is None else reason in missing
