"""On CUDA, compiled and captured: a token has the same bits in every window and beside others."""

import pytest
import torch
from helpers.models import good_exit
from helpers.prompts import prompt
from helpers.windows import logits, wide

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Sizes at which the compiler and the kernels cut sums otherwise than at small ones.
BIG = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "num_hidden_layers": 2, "max_position_embeddings": 1024,
}  # fmt: skip
HUGE = BIG | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
# Between the two, where the compiler may give a block two rows.
MIDDLE = HUGE | {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
WINDOWED = BIG | {"sliding_window": 100, "head_dim": 64}
HYBRID = WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", BIG),
        ("llama", MIDDLE),
        ("llama", HUGE),
        ("gemma2", HYBRID),
        ("starcoder2", WINDOWED),
    ],
)
def test_a_token_has_the_same_bits_in_every_window_and_beside_others(family, sizes, dtype):
    """At every length of K/V that is compiled for."""
    model, ids = wide(family, dtype, "cuda", **sizes), prompt(300, 1)
    alone = logits(model, ids, [1] * 300, capacity=300, compile=True)
    chunks = [64] * 4 + [44]  # as prompts are read
    for cuts, rows in (([5] * 60, 1), ([1] * 300, 4), ([5] * 60, 20), (chunks, 1), (chunks, 4)):
        assert torch.equal(logits(model, ids, cuts, rows, 640, compile=True), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["norm", "mlp", "layer"])
def test_an_exit_says_the_same_of_a_token_in_every_window_and_beside_others(arch, dtype):
    model, ids = wide("llama", dtype, "cuda", arch=arch, **BIG), prompt(120, 1)
    alone = logits(model, ids, [1] * 120, capacity=300, compile=True, exits=[2])
    for cuts, rows in (([5] * 24, 1), ([5] * 24, 4)):
        assert torch.equal(logits(model, ids, cuts, rows, 300, compile=True, exits=[2]), alone)


def test_speculative_texts_are_full_depths_in_half_precision():
    model = good_exit.__wrapped__("llama").to("cuda", torch.bfloat16)
    for seed in range(40):
        ids = torch.tensor([prompt(6, seed)], device="cuda")
        common = {"max_new_tokens": 24, "eos_token_id": None}
        full = model.generate(input_ids=ids, mode="full", **common)
        drafts = model.generate(input_ids=ids, mode="speculative", threshold=0.0, **common)
        assert torch.equal(drafts.sequences, full.sequences)
