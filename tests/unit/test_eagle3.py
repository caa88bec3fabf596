"""A draft exit as EAGLE-3 has it: its start, its steps, and its layout read by its own rules."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.families import COMMON, FAMILIES, tiny
from helpers.prompts import prompt
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.backbone import plan_of
from ee_tuning.cli import main
from ee_tuning.export import eagle3_tensors

TOKENIZER = Path(__file__).parents[2] / "demo" / "model"
IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))
PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3], [0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5]])
STEPS = 3
NAMES = {
    "fc.weight", "norm.weight", "lm_head.weight", "embed_tokens.weight",
    *(f"layers.0.self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    *(f"layers.0.{x}norm.weight" for x in ("input_layer", "hidden_", "post_attention_layer")),
}  # fmt: skip


def noisy(family="llama", vocabulary=0, sources="1,2,3", **settings):
    """An exit on a tiny model, with every weight random, that knows so many tokens (0: all)."""
    config = ExitConfig("", "eagle3", sources=sources, **settings)
    model = EarlyExitModel.from_base(tiny(family, **settings.pop("base", {})), config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.draft.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    model.draft.steps = STEPS
    if vocabulary:  # in no order
        model.reduce_vocabulary(torch.randperm(96, generator=draw)[:vocabulary])
    return model


class Plain:
    """EAGLE-3's draft of one text, from nothing but the tensors and the config of an export."""

    def __init__(self, tensors, config, eps):
        self.t, self.c, self.eps = tensors, config, eps
        self.keys, self.values = [], []

    def norm(self, x, name):
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled * self.t[f"{name}.weight"]

    def turn(self, x, position):
        """Rotate (heads, head dim) by its position, halves together."""
        half = x.shape[-1] // 2
        speed = self.c["rope_theta"] ** -(torch.arange(half, dtype=torch.float32) / half)
        cos, sin = (f(position * speed).repeat(2) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    def step(self, token, position, states=None, h=None):
        """The output for one token, from fused states or an output of the token before it."""
        own, mlp = "layers.0.self_attn", "layers.0.mlp"
        g = self.t["fc.weight"] @ states if h is None else h
        x = torch.cat([
            self.norm(self.t["embed_tokens.weight"][token], "layers.0.input_layernorm"),
            self.norm(g, "layers.0.hidden_norm"),
        ])  # fmt: skip
        size, heads = self.c["head_dim"], self.c["num_attention_heads"]
        q, k, v = (
            (self.t[f"{own}.{one}_proj.weight"] @ x).view(-1, size) for one in ("q", "k", "v")
        )
        self.keys.append(self.turn(k, position))
        self.values.append(v)
        each = heads // len(k)
        keys = torch.stack(self.keys, 1).repeat_interleave(each, 0)
        values = torch.stack(self.values, 1).repeat_interleave(each, 0)
        scores = (keys @ self.turn(q, position)[:, :, None])[..., 0] / size**0.5
        attended = (scores.softmax(-1)[:, None] @ values).flatten()
        a = g + self.t[f"{own}.o_proj.weight"] @ attended
        y = self.norm(a, "layers.0.post_attention_layernorm")
        gate, up, down = (self.t[f"{mlp}.{one}_proj.weight"] for one in ("gate", "up", "down"))
        return a + down @ (F.silu(gate @ y) * (up @ y))

    def logits(self, h):
        """Over all tokens, −∞ for those that the draft does not know."""
        known = self.t["lm_head.weight"] @ self.norm(h, "norm")
        if "d2t" not in self.t:
            return known
        tokens = torch.arange(len(known)) + self.t["d2t"]
        return torch.full((self.c["vocab_size"],), float("-inf")).index_copy(0, tokens, known)


def test_sources_are_those_that_engines_take_unless_told():
    assert ExitConfig("", "eagle3").specs(30)[0].sources == (2, 15, 27)
    assert ExitConfig("", "eagle3").specs(4)[0].sources == (1, 2)
    assert ExitConfig("0,2", "eagle3,mlp", sources="1,3").specs(4)[1].sources == (1, 3)


def test_a_copied_one_is_the_last_layer_once_more_on_the_high_state():
    """Of the token before, without the first of the text; but for sums in another order."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("", "eagle3", sources="1,2,3"))
    found = model(IDS, output_exit_logits=True).exit_logits[0]
    high = model.chain.descend(IDS).to(0).sources[-1]
    last = model.backbone.segment(3, 4)(high[:, :-1], torch.arange(1, 11).expand(2, -1)).hidden
    assert torch.allclose(found[:, 1:], model.backbone.final_logits(last), atol=1e-5)


def test_every_matrix_of_its_block_is_split_as_the_layers_are():
    """For several processes: paths of the layer's plan lead to those that write to the state."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("", "eagle3"))
    block, plan = model.draft.block, plan_of(model.backbone)
    styles = {block.get_submodule(k): v for k, v in model.draft.splits(plan).items()}
    linears = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert styles.keys() == set(linears.values())
    writes = {"self_attn.o_proj.o_proj", "mlp.mlp.down_proj"}
    assert {name for name, m in linears.items() if styles[m] == "rowwise"} == writes


@pytest.mark.parametrize("vocabulary", [0, 40])
def test_unrolled_steps_are_a_plain_draft_of_the_exported_tensors(vocabulary):
    """Every chain of every packed text that a draft can begin in. Tolerance: sums, 1e-4."""
    model = noisy(vocabulary=vocabulary)
    tensors = eagle3_tensors(model)
    config = {"rope_theta": 10000.0, "head_dim": 8, "num_attention_heads": 4, "vocab_size": 96}
    compared = 0
    with torch.no_grad():
        found = model.draft.predictions(model.chain.descend(IDS, PACKED).to(0))
        for row, first, stop in texts(PACKED):
            ids = IDS[row, first:stop]
            states = torch.cat(model.chain.descend(ids[None]).to(0).sources, dim=-1)[0]
            for start in range(1, len(ids)):
                plain = Plain(tensors, config, model.config.rms_norm_eps)
                for place in range(1, start + 1):
                    h = plain.step(ids[place], place, states=states[place - 1])
                for step in range(min(STEPS, len(ids) - start)):
                    if step:
                        h = plain.step(ids[start + step], start + step, h=h)
                    features = found[step][row : row + 1, first + start + step][None]
                    expected = plain.logits(h)
                    assert torch.allclose(model.draft.logits(features)[0, 0], expected, atol=1e-4)
                    compared += 1
    assert compared > 30


def texts(positions):
    """The (row, first, last + 1) of each text in packed positions (B, T)."""
    for row, line in enumerate(positions.tolist()):
        starts = [i for i, p in enumerate(line) if p == 0]
        yield from ((row, *pair) for pair in zip(starts, [*starts[1:], len(line)], strict=True))


@pytest.mark.parametrize("length", [1, 2, 30])
def test_decoding_is_lossless(length):
    """That drafts are those of a plain loop is in test_chains."""
    model, ids = noisy(vocabulary=40), torch.tensor([prompt(length, length)])
    common = {"max_new_tokens": 24, "eos_token_id": None}
    full = model.generate(ids, mode="full", **common).sequences
    way = {"mode": "speculative", "threshold": 0.0, "max_pending": 4}
    assert torch.equal(model.generate(ids, **way, **common).sequences, full)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gpt2", "llama-tied-bias"])
def test_layers_that_are_no_plain_llama_are_refused(family):
    with pytest.raises(UserError, match="an eagle3 exit is a layer of Llama's") as found:
        EarlyExitModel.from_base(tiny(family), ExitConfig("", "eagle3"))
    assert "\n" not in str(found.value)


def test_no_chain_of_a_text_s_first_token_is_tuned():
    """Nothing is asked there, and of zeros the gradient is as large as three norms make it."""
    model = noisy()
    state = model.chain.descend(IDS, PACKED).to(0)
    (labels, _), (later, _), *_ = model.draft.targets(IDS, state)
    asks = F.pad(PACKED[:, :-1], (1, 0))  # the place of the token before, whose label it is
    assert torch.equal(labels == -100, asks == 0)
    assert torch.equal(later == -100, asks < 2)


def test_a_fitted_start_is_refused():
    with pytest.raises(UserError, match="init fitted is not for an eagle3 exit"):
        ExitConfig("", "eagle3", init="fitted").specs(4)


def test_a_sliding_window_is_refused():
    with pytest.raises(UserError, match="a sliding window"):
        EarlyExitModel.from_base(tiny("mistral"), ExitConfig("", "eagle3"))


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A backbone with a tokenizer, and a function that saves exits on it."""
    base = tmp_path / "base"
    big = COMMON | {"vocab_size": 4096, "tie_word_embeddings": True}
    monkeypatch.setitem(FAMILIES, "big", ("llama", big))
    tiny("big").save_pretrained(base)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(base)

    def save(arch="eagle3", layers="", vocabulary=50, **settings):
        model = EarlyExitModel.from_base(str(base), ExitConfig(layers, arch, **settings))
        if vocabulary:
            model.reduce_vocabulary(torch.arange(vocabulary) * 7 + 3)
        model.save_pretrained(tmp_path / "exits")
        return tmp_path

    return save


def export(folder, *args):
    main(["export", "--exits", str(folder / "exits"), "--out", str(folder / "out"), *args])


@pytest.mark.parametrize("vocabulary", [0, 50])
@pytest.mark.parametrize("form", ["speculators", "sglang"])
def test_names_shapes_and_config_are_those_of_the_layout(saved, form, vocabulary, capsys):
    folder = saved(vocabulary=vocabulary, sources="1,2,4")
    export(folder, "--eagle3", form)
    assert "the draft exit in EAGLE-3's layout saved in" in capsys.readouterr().out
    config = json.loads((folder / "out/config.json").read_text())
    found = load_file(folder / "out/model.safetensors")
    maps = {"d2t", "t2d"} if vocabulary else set()
    names = {name.replace("midlayer.", "layers.0.") for name in found}
    assert names == NAMES | maps
    assert any("midlayer" in name for name in found) == (form == "sglang")
    known = vocabulary or 4096
    assert found["fc.weight"].shape == (32, 96)
    assert found["lm_head.weight"].shape == (known, 32)
    layer = "midlayer" if form == "sglang" else "layers.0"
    assert found[f"{layer}.self_attn.q_proj.weight"].shape == (32, 64)
    assert found[f"{layer}.self_attn.k_proj.weight"].shape == (16, 64)
    assert found[f"{layer}.self_attn.o_proj.weight"].shape == (32, 32)
    if vocabulary:
        assert (torch.arange(50) + found["d2t"]).tolist() == [7 * i + 3 for i in range(50)]
        assert found["t2d"].nonzero().flatten().tolist() == [7 * i + 3 for i in range(50)]
        assert (found["t2d"].dtype, found["t2d"].shape) == (torch.bool, (4096,))
    assert (config["draft_vocab_size"], config["norm_before_residual"]) == (known, False)
    if form == "sglang":
        assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 3]
        own = config
    else:
        assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 4]
        assert config["speculators_config"]["verifier"] == {
            "name_or_path": str(folder / "base"), "architectures": ["LlamaForCausalLM"],
        }  # fmt: skip
        own = config["transformer_layer_config"]
    made = LlamaConfig(**own)
    assert (made.num_hidden_layers, made.hidden_size, made.head_dim) == (1, 32, 8)
    assert made.rope_parameters["rope_theta"] == own["rope_theta"] == 10000.0
    assert (folder / "out/tokenizer.json").is_file()
    export(folder, "--eagle3", form, "--overwrite")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "draft"}, "cannot say what a draft exit of arch draft computes"),
        ({"arch": "mlp", "layers": "2"}, "there is no draft exit: tune one with --arch eagle3"),
        ({"sources": "1,2"}, "the draft exit reads 2 layers, and engines hand on 3"),
    ],
)
def test_what_the_layout_cannot_say_is_one_line(saved, capsys, settings, message):
    folder = saved(**settings)
    with pytest.raises(SystemExit) as stop:
        export(folder, "--eagle3", "speculators")
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert message in error
    assert "\n" not in error


def test_a_draft_exit_is_exported_with_eagle3(saved, capsys):
    with pytest.raises(SystemExit) as stop:
        export(saved(), "--layer", "2")
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert "there is no exit at layer 2: a draft exit sits at no layer; one of arch eagle3" in error
    assert "is saved with --eagle3 speculators or --eagle3 sglang" in error
    assert "\n" not in error
