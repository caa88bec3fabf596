"""What a token's numbers are does not depend on what is computed beside it: the same bits."""

import pytest
import torch
from helpers.families import tiny
from helpers.models import good_exit
from helpers.prompts import prompt
from helpers.windows import SIZES, logits, wide
from torch import nn
from transformers.activations import ACT2FN

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.exit_config import DRAFT
from ee_tuning.invariant import Invariant
from ee_tuning.invariant.products import InBlocks, Weights, is_activation, products
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.prompts import read
from ee_tuning.passes.wanted import Wanted

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "starcoder2", "opt"])
@pytest.mark.parametrize("arch", ["embedding", "norm", "mlp", "layer"])
def test_an_exit_says_the_same_of_a_token_in_every_window_and_beside_others(arch, family, dtype):
    """And what it says when it is asked about the whole text, but for the order of sums."""
    model, ids = wide(family, dtype, arch=arch), prompt(40, 1)
    alone = logits(model, ids, [1] * 40, exits=[2])
    assert torch.equal(logits(model, ids, [5] * 8, exits=[2]), alone)
    assert torch.equal(logits(model, ids, [2, 3, 4, 7, 8, 9, 1, 6], exits=[2]), alone)
    assert torch.equal(logits(model, ids, [5] * 8, rows=3, exits=[2]), alone)
    if dtype == torch.float32:  # where another order changes a number by no more than this
        with torch.inference_mode():
            whole = model(torch.tensor([ids]), output_exit_logits=True).exit_logits[2][0]
        assert torch.allclose(alone, whole, atol=1e-5, rtol=1e-4)


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


def reading(model, layers, given, wanted=("last", True)):
    """Passes that have read prompts, by slot: these, the logits after each, and how many stood
    beside each other at most."""
    passes = Passes(model, layers, slots=5, capacity=120, longest=8)
    most, found, prompts = 0, {}, passes.prompts

    def counting(some, *others):
        nonlocal most
        most = max(most, len(some))
        return prompts(some, *others)

    passes.prompts = counting
    for reads in read(passes, given, len(passes.segments) - 1, Wanted(*wanted), None):
        found |= {one.slot: one.found.logits.clone() for one in reads}
    return passes, found, most


def kept(passes, slot):
    """K and V of a slot, of layers and exits."""
    caches = [*passes.caches, *passes.exit_caches.values()]
    caches += [] if passes.chains is None else [passes.chains.cache]
    layers = [layer for cache in caches for layer in cache.slot_layers]
    return [x[slot] for layer in layers for x in (layer.keys, layer.values)]


WITH_EXITS = {
    "exits": ExitConfig("1,2,3", arch="mlp,norm,layer"),
    "draft exit": ExitConfig("0", arch="draft"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*FAMILIES, "mistral", "gemma3", *WITH_EXITS])
def test_prompts_beside_each_other_are_read_as_alone(kind, dtype):
    """The logits after them and all K/V, bit for bit; some are longer than a window."""
    if kind in WITH_EXITS:
        model = EarlyExitModel.from_base(tiny("llama", **SIZES).to(dtype), WITH_EXITS[kind]).eval()
    else:
        model = wide(kind, dtype)
    layers = {"exits": [1, 2, 3], "draft exit": [DRAFT]}.get(kind, [])
    given = {slot: prompt(length, slot) for slot, length in [(3, 40), (0, 1), (4, 17), (1, 7)]}
    passes, found, most = reading(model, layers, given)
    assert most == len(given)
    for slot, ids in given.items():
        other, alone, _ = reading(model, layers, {2: ids})
        assert torch.equal(found[slot], alone[2])
        for one, same in zip(kept(passes, slot), kept(other, 2), strict=True):
            assert torch.equal(one, same)
    if dtype == torch.float32:  # where another order of sums changes a number by no more than this
        with torch.inference_mode():
            whole = model.backbone.model(torch.tensor([given[3]])).logits[0, -1]
        assert torch.allclose(found[3], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_beside_each_other_are_cut_between_threads_as_alone(dtype):
    """With so many tokens that torch lets several threads compute one activation, a GELU."""
    sizes = {"intermediate_size": 192, "max_position_embeddings": 256}
    model = wide("starcoder2", dtype, **sizes)
    given = {slot: prompt(length, slot) for slot, length in enumerate((100, 3, 90, 118))}
    threads = torch.get_num_threads()
    try:
        for number in (1, 3, 5):
            torch.set_num_threads(number)
            found = reading(model, [], given)[1]
            for slot, ids in given.items():
                assert torch.equal(found[slot], reading(model, [], {slot: ids})[1][slot])
    finally:
        torch.set_num_threads(threads)


def test_long_prompts_and_those_that_an_exit_goes_on_with_are_read_one_by_one(monkeypatch):
    model = wide("llama", torch.float32)
    given = {slot: prompt(9, slot) for slot in range(3)}
    assert reading(model, [2], given)[2] == 3
    assert reading(model, [2], given, wanted=("last", False))[2] == 1
    monkeypatch.setattr("ee_tuning.passes.prompts.BESIDE", 20)
    assert reading(model, [2], given)[2] == 2
    assert reading(model, [2], {0: prompt(30)})[2] == 1


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("threads", [1, 3, 5])
def test_an_activation_does_not_depend_on_how_many_tokens_there_are(name, threads):
    activation, before = ACT2FN[name], torch.get_num_threads()
    assert is_activation(activation)
    try:
        torch.set_num_threads(threads)
        for width in (192, 48, 37):
            x = torch.randn(1, 700, 200)[:, :, :width]
            whole = InBlocks(activation)(x)
            # Torch has another GELU for what does not lie in one piece.
            assert torch.allclose(whole, activation(x), atol=5e-6)
            for number in (1, 2, 100, 171, 257, 500):
                assert torch.equal(InBlocks(activation)(x[:, :number]), whole[:, :number])
    finally:
        torch.set_num_threads(before)


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


@pytest.mark.parametrize("least", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_a_product_has_the_same_bits_however_few_there_are(dtype, least, monkeypatch):
    """On any CPU, whichever number of them is the fastest."""
    monkeypatch.setattr("ee_tuning.invariant.products.LEAST", least)
    torch.manual_seed(0)
    (product,), x = products([nn.Linear(1536, 576).to(dtype)]), torch.randn(9, 1, 1536, dtype=dtype)
    with torch.inference_mode():
        whole = product(x)
        for number in range(1, 9):
            few = x[:number]
            assert torch.equal(product(few), whole[:number])
            assert torch.equal(product(few.transpose(0, 1)), whole[:number].transpose(0, 1))


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


@pytest.mark.parametrize("inference", [False, True])  # whether there are versions
@pytest.mark.parametrize("changed", [["weight"], ["bias"], ["weight", "bias"]])
def test_weights_that_changed_are_read_anew(changed, inference):
    with torch.inference_mode(inference):
        layer, x = nn.Linear(64, 64), torch.randn(3, 64)
    with torch.inference_mode():
        before = products([layer])[0](x)
    assert torch.allclose(before, layer(x), atol=1e-5)
    with torch.inference_mode(inference), torch.no_grad():
        for name in changed:
            getattr(layer, name).mul_(2)
    with torch.inference_mode():
        after = products([layer])[0](x)
    assert torch.allclose(after, layer(x), atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-5)
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


def change(p):
    with torch.no_grad():
        p.mul_(-2)


def change_data(p):
    """As PEFT merges an adapter, and as older optimizers step."""
    p.data *= -2


@pytest.mark.parametrize("way", [change, change_data])
@pytest.mark.parametrize("part", ["exit", "backbone"])
@pytest.mark.parametrize("anew", [False, True])  # on the backbone that another model had
def test_weights_that_were_changed_where_they_are_say_other_things(way, part, anew):
    model = good_exit.__wrapped__("llama", "mlp")
    common = {"max_new_tokens": 9, "mode": "fixed", "exit_layers": [2], "eos_token_id": None}
    ids = torch.tensor([prompt(5)])
    before = model.generate(ids, **common)
    changed = model.exit(2) if part == "exit" else model.model.model.layers[0].mlp
    for p in changed.parameters():
        way(p)
    fresh = good_exit.__wrapped__("llama", "mlp")
    fresh.load_state_dict(model.state_dict())
    if anew:
        exits, model = (
            model.exits.state_dict(),
            EarlyExitModel.from_base(model.model, ExitConfig("2", arch="mlp")),
        )
        model.exits.load_state_dict(exits, strict=False)
    after, expected = model.generate(ids, **common), fresh.generate(ids, **common)
    assert torch.equal(after.sequences, expected.sequences)
    assert torch.equal(after.confidences, expected.confidences)
    assert not torch.equal(after.confidences, before.confidences)
