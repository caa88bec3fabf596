"""Every family and architecture: segments, exits, a tuning step, saving, generating."""

import pytest
import torch
from helpers.families import FAMILIES, MOE, OTHERS, RECURRENT, REFUSED, UNDECODED, tiny
from helpers.steps import exit_gradients

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.exit_config import ARCHS, DRAFTS

ALL = [*FAMILIES, *MOE]
DEPTH = 4


AT_LAYERS = [arch for arch in ARCHS if arch not in DRAFTS]  # which have tests of their own


def archs_of(family):
    return [arch for arch in ARCHS if not (family in MOE and arch == "mlp")]


def prompt(length=7, seed=1):
    return torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(seed))


def batch(rows=2, length=12):
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length).repeat(rows, 1)}


@pytest.mark.parametrize("family", ALL)
def test_segments_are_the_whole_model(family):
    """The chain of segments, cut after every layer, gives the model's own logits, bit for bit."""
    model = tiny(family)
    ids = batch()["input_ids"]
    early_exit = EarlyExitModel.from_base(model, ExitConfig("1,2,3", arch="norm"))
    logits = early_exit(ids, output_logits=True).logits
    with torch.no_grad():
        assert torch.equal(logits, model(ids).logits)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("arch", AT_LAYERS)
def test_attach_step_save_load_generate(family, arch, tmp_path):
    model = tiny(family)
    config = ExitConfig("2,3", arch=arch)
    if arch not in archs_of(family):
        with pytest.raises(UserError, match="mixture of experts"):
            EarlyExitModel.from_base(model, config)
        return
    early_exit = EarlyExitModel.from_base(model, config).train()
    backbone = {k: v.clone() for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in early_exit.exit_state().items()}

    optimizer = torch.optim.AdamW(early_exit.exits.parameters(), lr=1e-2)
    exit_gradients(early_exit, [batch()])
    optimizer.step()

    after = early_exit.exit_state()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in backbone.items())
    unchanged = [name for name in after if torch.equal(before[name], after[name])]
    # Of an expert that no token was routed to, and of key biases (softmax ignores a shift that is
    # the same for all keys), the gradient is zero or rounding.
    assert [n for n in unchanged if "expert" not in n and "k_proj.bias" not in n] == []
    trainable = {n for n, p in early_exit.named_parameters() if p.requires_grad}
    assert trainable == {f"exits.{name}" for name in after}

    early_exit.save_pretrained(tmp_path)
    loaded = EarlyExitModel.from_pretrained(str(tmp_path), model=model)
    ids = batch()["input_ids"]
    ours, theirs = (m(ids, output_exit_logits=True).exit_logits for m in (early_exit, loaded))
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in (2, 3))
    a, b = (m.generate(prompt(), threshold=0.03, max_new_tokens=6) for m in (early_exit, loaded))
    assert torch.equal(a.sequences, b.sequences)


@pytest.mark.parametrize("family", ALL)
def test_full_depth_is_transformers_generate(family):
    """τ = 1 and mode full: token for token transformers' own."""
    model = tiny(family)
    early_exit = EarlyExitModel.from_base(model, ExitConfig("1,2,3", arch="norm"))
    kwargs = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(prompt(), **kwargs)
    for mode in ({"mode": "full"}, {"mode": "threshold", "threshold": 1.0}):
        out = early_exit.generate(prompt(), **mode, **kwargs)
        assert torch.equal(out.sequences, expected)
        assert (out.exit_layers == DEPTH).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_copied_mlp_exit_is_the_copied_norm_exit(family):
    model = tiny(family)
    ids = batch()["input_ids"]
    mlp, norm = (
        EarlyExitModel.from_base(model, ExitConfig("1,2,3", arch=arch))(
            ids, output_exit_logits=True
        )
        for arch in ("mlp", "norm")
    )
    assert all(torch.equal(mlp.exit_logits[k], norm.exit_logits[k]) for k in (1, 2, 3))


@pytest.mark.parametrize("family", ALL)
def test_packed_documents_do_not_see_each_other(family):
    """A packed row gives the logits of its documents alone.

    Tolerance: attention sums over a longer, masked row in another order.
    """
    model = tiny(family)
    arch = "norm,layer,norm" if family in MOE else "mlp,layer,norm"
    early_exit = EarlyExitModel.from_base(model, ExitConfig("1,2,3", arch=arch))
    ids = batch(rows=2, length=12)["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(7)]).repeat(2, 1)
    packed = early_exit(ids, position_ids=positions, output_exit_logits=True, output_logits=True)
    alone = [
        early_exit(part, output_exit_logits=True, output_logits=True)
        for part in (ids[:, :5], ids[:, 5:])
    ]
    for layer in (1, 2, 3):
        expected = torch.cat([out.exit_logits[layer] for out in alone], dim=1)
        torch.testing.assert_close(packed.exit_logits[layer], expected, rtol=1e-4, atol=1e-5)
    expected = torch.cat([out.logits for out in alone], dim=1)
    torch.testing.assert_close(packed.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*ALL, *OTHERS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_are_as_they_are_alone(family, side):
    """With an attention_mask, as tokenizers give it.

    Tolerance: attention sums over a longer row in another order; of the largest logit, since it is
    that by which a family with large hidden states rounds.
    """
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("1,2", "norm,layer"))
    ids, mask = batch(rows=2, length=12)["input_ids"], torch.ones(2, 12, dtype=torch.int64)
    places = [slice(7, 12) if side == "left" else slice(5), slice(12)]
    mask[0] = 0
    mask[0, places[0]] = 1
    asked = {"output_exit_logits": True, "output_logits": True}
    padded = model(input_ids=ids, attention_mask=mask, labels=ids, **asked)
    alone = [
        model(ids[[row], place], labels=ids[[row], place], **asked)
        for row, place in enumerate(places)
    ]
    of_losses = {"rtol": 1e-3, "atol": 1e-4}
    close = {"rtol": 1e-3, "atol": 1e-4 * max(1.0, float(padded.logits.abs().max()))}
    for layer in (1, 2):
        for row, (place, one) in enumerate(zip(places, alone, strict=True)):
            found = padded.exit_logits[layer][row, place]
            torch.testing.assert_close(found, one.exit_logits[layer][0], **close)
            torch.testing.assert_close(padded.logits[row, place], one.logits[0], **close)
        expected = (4 * alone[0].exit_losses[layer] + 11 * alone[1].exit_losses[layer]) / 15
        torch.testing.assert_close(padded.exit_losses[layer], expected, **of_losses)


@pytest.mark.parametrize("family", ALL)
def test_only_needed_tensors_are_read(family, tmp_path, monkeypatch):
    """With the deepest exit at layer 2 of 4, no tensor of layers 3 and 4 is read from disk."""
    import transformers.modeling_utils as loader

    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    read = []

    class Recording:
        def __init__(self, *args, **kwargs):
            self.file = original(*args, **kwargs)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_slice(self, name):
            return RecordingSlice(name, self.file.get_slice(name))

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.file, name)

    class RecordingSlice:
        def __init__(self, name, part):
            self.name, self.part = name, part

        def __getitem__(self, key):
            read.append(self.name)
            return self.part[key]

        def __getattr__(self, name):
            return getattr(self.part, name)

    original = loader.safe_open
    monkeypatch.setattr(loader, "safe_open", Recording)
    config = ExitConfig("1,2", arch="norm")
    part = EarlyExitModel.from_base(str(tmp_path), config, whole=False)
    deep = [n for n in read if any(mark in n for mark in (".2.", ".3.")) and "expert" not in n]
    assert read
    assert deep == []
    ids = batch()["input_ids"]
    whole = EarlyExitModel.from_base(model, config)
    a, b = (m(ids, output_exit_logits=True).exit_logits[2] for m in (part, whole))
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_go_the_same_way(family):
    """Drafts leave transformers' tokens as they are, and packed documents do not see each other."""
    base = tiny(family)
    model = EarlyExitModel.from_base(base, ExitConfig("1,2", "norm,layer")).eval()
    ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(1))
    common = {"max_new_tokens": 12, "eos_token_id": None}
    out = model.generate(ids, mode="speculative", threshold=0.0, **common).sequences
    assert torch.equal(out, base.generate(ids, do_sample=False, **common))
    places = torch.arange(6).repeat(1, 2)
    packed = model(ids, position_ids=places, output_exit_logits=True).exit_logits
    alone = model(ids[:, 6:], output_exit_logits=True).exit_logits
    for layer in (1, 2):
        torch.testing.assert_close(packed[layer][:, 6:], alone[layer], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_more_than_its_layers_is_refused(family):
    with pytest.raises(UserError, match=f"type {family} cannot be cut.*outside of its layers"):
        EarlyExitModel.from_base(tiny(family), ExitConfig("1,2", "norm"))


def test_alibi_is_refused():
    with pytest.raises(UserError, match=r"type falcon cannot be cut.*ALiBi"):
        EarlyExitModel.from_base(tiny("falcon", alibi=True), ExitConfig("1,2", "norm"))


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_family_is_refused(family):
    """Packed documents would see each other, and there are no K/V to fill in later."""
    with pytest.raises(UserError, match="carry a state from token to token"):
        EarlyExitModel.from_base(tiny(family), ExitConfig("1,2", "norm"))


@pytest.mark.parametrize("family", UNDECODED)
def test_what_is_not_decoded_says_so(family):
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("1,2", "norm")).eval()
    ids = torch.tensor([[5, 9]])
    assert model(ids, output_exit_logits=True).exit_logits[2].shape == (1, 2, 96)
    with pytest.raises(UserError, match="can be tuned, but not decoded"):
        model.generate(ids)
