"""GGUF files as backbones: the same numbers, tokens and refusals as of an ordinary checkpoint."""

import os
import shutil

import numpy as np
import pytest
import torch
from helpers.families import tiny

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.cli import main
from ee_tuning.errors import Notice
from ee_tuning.loading import load_backbone, load_config, load_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.layers.": "blk.",
}  # fmt: skip


def paired(weight, heads):
    """Rows of q and k as llama.cpp keeps them: what rotates together stands together."""
    rows = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


@pytest.fixture(scope="module")
def model():
    return tiny("llama", vocab_size=64, hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """`model` as a GGUF file, its weights in fp32 as they are, with a small BPE tokenizer."""
    path, config = tmp_path_factory.mktemp("gguf") / "tiny.gguf", model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(33 + i) for i in range(config.vocab_size - 3)]
    tokens = ["<|bos|>", "<|endoftext|>", *letters, "!#"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["! #"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        weight = value.float().numpy()
        if "attn_q.weight" in name:
            weight = paired(weight, config.num_attention_heads)
        if "attn_k.weight" in name:
            weight = paired(weight, config.num_key_value_heads)
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_its_numbers_are_those_of_the_model(model, file):
    with pytest.warns(Notice, match="ordinary numbers"):
        found = load_backbone(str(file))
    assert found.name_or_path == str(file)
    ids = torch.arange(12)[None]
    assert torch.equal(found(ids).logits, model(ids).logits)


def test_it_is_parsed_once_until_it_changes(model, file, tmp_path, monkeypatch):
    """For the config, the weights and the tokenizer, of which commands ask one after another."""
    parsed, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or reader(path))
    own = shutil.copy(file, tmp_path / "own.gguf")
    ids = torch.arange(12)[None]
    for times in (1, 2):
        assert load_config(str(own)).num_hidden_layers == model.config.num_hidden_layers
        with pytest.warns(Notice):
            found = load_backbone(str(own))
        assert len(load_tokenizer(str(own), 64)) == 64
        assert len(parsed) == times
        assert torch.equal(found(ids).logits, model(ids).logits)
        os.utime(own, (times, times))


def test_a_folder_with_one_file_is_that_file_and_exits_remember_it(file, tmp_path):
    with pytest.warns(Notice):
        exits = EarlyExitModel.from_base(str(file.parent), ExitConfig([1], "norm"), whole=False)
    exits.save_pretrained(tmp_path)
    with pytest.warns(Notice):
        again = EarlyExitModel.from_pretrained(str(tmp_path))
    ids = torch.arange(12)[None]
    expected = exits(ids, output_exit_logits=True).exit_logits[1]
    assert torch.equal(again(ids, output_exit_logits=True).exit_logits[1], expected)
    assert len(load_tokenizer(str(file), 64)) == 64


def test_two_files_or_one_of_a_strange_architecture_are_refused(file, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(UserError, match=r"several GGUF files, a\.gguf, b\.gguf: name one"):
        load_config(str(tmp_path))
    strange = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(strange, "no-such-architecture")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="cannot read the backbone"):
        load_config(str(strange))
    with pytest.raises(UserError, match="there is no such file"):
        load_config(str(tmp_path / "nowhere.gguf"))


def test_the_command_says_it_in_a_line(file, tmp_path, capsys):
    args = ["--model", str(file), "--layers", "1", "--arch", "norm", "--out", str(tmp_path / "e")]
    with pytest.warns(Notice, match=r"tiny\.gguf: its blocks are made ordinary numbers"):
        main(["init", *args])
    assert capsys.readouterr().err == ""  # no progress of transformers'
