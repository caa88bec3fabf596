"""Decoding with caches equals a slow reference that recomputes everything at every token."""

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.decode import Decoder

DEPTH = 4
MODELS: dict[str, EarlyExitModel] = {}


def early_exit(family="llama", arch="mlp,norm,layer"):
    """One model per family and architecture for the whole file: they are read only."""
    key = f"{family}/{arch}"
    if key not in MODELS:
        MODELS[key] = EarlyExitModel.from_base(tiny(family), ExitConfig("1,2,3", arch=arch)).eval()
    return MODELS[key]


def logits_from_scratch(model, ids, layer):
    """Logits (1, V) after the last token, at exit `layer` or the final exit: no cache, one pass."""
    out = model(ids, output_exit_logits=True, output_logits=True)
    return (out.logits if layer == DEPTH else out.exit_logits[layer])[:, -1]


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(
        ["llama", "mistral", "gemma2", "opt", "gpt2", "falcon", "granite", "phi"]
    ),
    pattern=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=14),
    length=st.integers(1, 9),
    max_pending=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_kv_recomputation_equals_recomputing_everything(family, pattern, length, max_pending, seed):
    """Over random exit patterns. Tolerance: a window of several tokens sums in another order."""
    model = early_exit(family)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (1, length), generator=generator)

    def policy(layer, confidence):
        return layer >= wanted_layer

    decoder = Decoder(model, [1, 2, 3], DEPTH, max_pending, policy)
    token = decoder.prefill(ids)
    assert token.exit_layer == DEPTH
    for wanted_layer in [*pattern, DEPTH]:
        expected = logits_from_scratch(model, ids, token.exit_layer)
        torch.testing.assert_close(token.logits, expected, rtol=1e-4, atol=1e-4)
        chosen = torch.randint(3, 96, (1, 1), generator=generator)
        ids = torch.cat([ids, chosen], dim=1)
        token = decoder.step(chosen)
        assert all(x is None or x.shape[1] <= max_pending for x in decoder.inboxes)
        assert token.exit_layer in (wanted_layer, *range(wanted_layer, DEPTH + 1))
    assert decoder.lengths[0] == ids.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fixed_mode_equals_the_exit_from_scratch(family, layer):
    """Every token of mode fixed is what exit `layer` alone predicts, the first one included."""
    model = early_exit(family)
    ids = torch.tensor([[5, 9, 11, 40]])
    out = model.generate(
        ids, mode="fixed", exit_layers=[layer], max_new_tokens=8, eos_token_id=None
    )
    for i in range(8):
        expected = logits_from_scratch(model, out.sequences[:, : 4 + i], layer).argmax()
        assert expected == out.sequences[0, 4 + i]
    assert (out.exit_layers == layer).all()


def test_layer_exit_uses_positions_in_training_and_decoding_alike():
    """The block's logits depend on order, and are the same with caches and in one pass."""
    model = early_exit(arch="layer")
    ids = torch.tensor([[5, 9, 11, 40, 7, 8]])
    decoder = Decoder(model, [2], 2, 8, lambda *_: True)
    decoder.prefill(ids[:, :3])
    for i in (3, 4, 5):
        token = decoder.step(ids[:, i : i + 1])
        expected = logits_from_scratch(model, ids[:, : i + 1], 2)
        torch.testing.assert_close(token.logits, expected, rtol=1e-4, atol=1e-5)
    swapped = logits_from_scratch(model, torch.tensor([[9, 5, 11, 40, 7, 8]]), 2)
    assert not torch.allclose(token.logits, swapped, atol=1e-3)


def test_threshold_lets_confident_tokens_leave_at_the_first_exit_that_is_sure():
    model = early_exit()
    out = model.generate(
        torch.tensor([[5, 9, 11]]), threshold=0.02, max_new_tokens=30, eos_token_id=None
    )
    layers, sure = out.exit_layers[0], out.confidences[0]
    assert layers[0] == DEPTH
    assert (sure[layers < DEPTH] >= 0.02).all()
    assert len(set(layers.tolist())) > 1
    always = model.generate(
        torch.tensor([[5, 9, 11]]), threshold=0.0, max_pending=100, max_new_tokens=9
    )
    assert always.exit_layers[0].tolist() == [DEPTH] + [1] * 8


def test_pending_bound_forces_a_full_pass():
    model = early_exit()
    out = model.generate(
        torch.tensor([[5, 9]]), threshold=0.0, max_pending=2, max_new_tokens=10, eos_token_id=None
    )
    assert out.exit_layers[0].tolist() == [4, 1, 1, 4, 1, 1, 4, 1, 1, 4]


def test_streaming_and_callbacks_see_every_token():
    model = early_exit()
    seen, streamed = [], []

    class Streamer:
        def put(self, ids):
            streamed.extend(ids.flatten().tolist())

        def end(self):
            streamed.append("end")

    ids = torch.tensor([[5, 9, 11]])
    out = model.generate(
        ids, threshold=0.02, max_new_tokens=6, streamer=Streamer(), on_token=seen.append
    )
    assert streamed == [*out.sequences[0].tolist(), "end"]
    assert [token.exit_layer for token in seen] == out.exit_layers[0].tolist()


def test_eos_and_stop_strings_end_generation(base, tokenizer):
    model = EarlyExitModel.from_base(base, ExitConfig("2", arch="norm"))
    ids = tokenizer("def function", return_tensors="pt").input_ids
    free = model.generate(ids, mode="full", max_new_tokens=8, eos_token_id=None).sequences[0]
    new = free[ids.shape[1] :]
    stopped = model.generate(ids, mode="full", max_new_tokens=8, eos_token_id=new[2].item())
    assert stopped.sequences.shape[1] <= ids.shape[1] + 3
    text = tokenizer.decode(new[1:3])  # spans two tokens
    out = model.generate(
        ids, mode="full", max_new_tokens=8, stop_strings=[text], tokenizer=tokenizer
    )
    new_text = tokenizer.decode(out.sequences[0, ids.shape[1] :])
    assert text in new_text
    assert text not in tokenizer.decode(out.sequences[0, ids.shape[1] : -1])


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        ([[]], {}, "prompt is empty"),
        ([[1] * 64], {}, "context is 64"),
        ([[1], [2]], {}, "one prompt"),
        ([[1]], {"threshold": 1.5}, r"outside \[0, 1\]"),
        ([[1]], {"threshold": -0.1}, r"outside \[0, 1\]"),
        ([[1]], {"mode": "fast"}, "use one of full, fixed, threshold, speculative"),
        ([[1]], {"mode": "fixed"}, "needs one exit"),
        ([[1]], {"exit_layers": [4]}, "no exit at layer 4"),
        ([[1]], {"exit_layers": [9]}, "exit layer 9 does not exist"),
        ([[1]], {"max_pending": -1}, "negative"),
        ([[1]], {"num_beams": 2}, "beam search"),
    ],
)
def test_bad_calls(ids, kwargs, message):
    with pytest.raises(UserError, match=message):
        early_exit().generate(torch.tensor(ids, dtype=torch.long), max_new_tokens=2, **kwargs)
