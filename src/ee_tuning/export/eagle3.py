"""A draft exit in the layout of EAGLE-3 (arXiv 2503.01840), which engines draft with.

Two forms of it are about. That of `speculators`, which it and vLLM read: tensors of ``layers.0``, a
config in which the layer's own is nested, source layers counted as hidden states (k: after k
layers). And the authors' own, which SGLang and vLLM read: ``midlayer``, a flat config, source
layers counted from 0 (k: after layer k). In both, ``d2t`` is what is to be added to a draft's
number to have the token's, and ``t2d`` says which tokens the draft knows. The backbone's embedding
is in both: not every reader takes it from the backbone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ee_tuning.errors import UserError
from ee_tuning.exits import DraftExit, Eagle3Exit
from ee_tuning.export.checkpoint import staged
from ee_tuning.files import write_json, write_text
from ee_tuning.model import Network

WEIGHTS = "model.safetensors"
SOURCES = 3  # that the engines read
DRAFTS = 4  # a round, unless the engine is told otherwise


def eagle3_tensors(model: Network) -> dict[str, Tensor]:
    """The draft exit's tensors by the names that `speculators` gives them.

    Raises:
        UserError: there is no draft exit, or one that computes what the layout cannot say.
    """
    exit = _exportable(model)
    block: Any = exit.block
    attention, mlp = block.self_attn, block.mlp.mlp
    layer = {
        "input_layernorm": block.input_layernorm.token,
        "hidden_norm": block.input_layernorm.state,
        "post_attention_layernorm": block.post_attention_layernorm.norm,
        "self_attn.q_proj": attention.q_proj,
        "self_attn.k_proj": attention.k_proj,
        "self_attn.v_proj": attention.v_proj,
        "self_attn.o_proj": attention.o_proj.o_proj,
        "mlp.gate_proj": mlp.gate_proj,
        "mlp.up_proj": mlp.up_proj,
        "mlp.down_proj": mlp.down_proj,
    }
    modules = {f"layers.0.{name}": module for name, module in layer.items()}
    modules |= {"fc": exit.first, "norm": exit.norm, "lm_head": exit.output.linear}
    modules["embed_tokens"] = model.model.get_input_embeddings()
    found = {f"{name}.weight": module.weight.detach() for name, module in modules.items()}
    if exit.output.tokens is not None:
        # By the numbers of tokens: a reader may pick the head's rows out of the backbone's by t2d.
        tokens, order = exit.output.tokens.sort()
        found["lm_head.weight"] = found["lm_head.weight"][order]
        found["d2t"] = tokens - torch.arange(len(tokens), device=tokens.device)
        found["t2d"] = torch.zeros(exit.output.vocabulary, dtype=torch.bool, device=tokens.device)
        found["t2d"][tokens] = True
    dtype = model.dtype
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.items()}
    # Copies: a head may be the embedding, and a file has no tensor twice.
    return {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in cast.items()
    }


def _exportable(model: Network) -> Eagle3Exit:
    exit: DraftExit | None = model.draft
    if exit is None:
        raise UserError(
            "there is no draft exit: tune one with --arch eagle3, or export an exit at a layer "
            "with --layer"
        )
    if not isinstance(exit, Eagle3Exit):
        raise UserError(
            "EAGLE-3's layout cannot say what a draft exit of arch draft computes (a map of its "
            "own for the first draft of a chain, norms of the states): tune one with --arch eagle3"
        )
    if len(exit.sources) != SOURCES:
        raise UserError(
            f"the draft exit reads {len(exit.sources)} layers, and engines hand on {SOURCES}: tune "
            "one with three --draft-sources"
        )
    return exit


def eagle3_config(model: Network, base: str, form: str) -> dict[str, Any]:
    """The ``config.json`` of a form, ``speculators`` or ``sglang``. base: the backbone."""
    exit, config = _exportable(model), model.config
    layer = _layer_config(config, str(model.dtype).removeprefix("torch."))
    common = {"draft_vocab_size": exit.output.size, "norm_before_residual": False}
    if form == "sglang":
        counted = [number - 1 for number in exit.sources]
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "eagle_config": {
                "use_aux_hidden_state": True,
                "eagle_aux_hidden_state_layer_ids": counted,
            },
            **layer,
            **common,
        }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": DRAFTS}],
            "verifier": {"name_or_path": base, "architectures": [type(model.model).__name__]},
        },
        "transformer_layer_config": layer,
        "eagle_aux_hidden_state_layer_ids": [*exit.sources],
        "dtype": layer["dtype"],
        **common,
    }


def _layer_config(config: Any, dtype: str) -> dict[str, Any]:
    """What a Llama of one layer like the exit's is made by, in the words of old and new readers."""
    heads = config.num_attention_heads
    rope = dict(config.rope_parameters)
    scaled = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaled,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def save_eagle3(
    model: Network, tokenizer: PreTrainedTokenizerBase, folder: Path, base: str, form: str
) -> None:
    """Write the draft exit in a form, with tokenizer and card, to `folder`; see `eagle3_config`.

    Raises:
        UserError: see `eagle3_tensors`; or it cannot be written, or read back.
    """
    state, config = eagle3_tensors(model), eagle3_config(model, base, form)
    if form == "sglang":
        state = {name.replace("layers.0.", "midlayer."): one for name, one in state.items()}
    with staged(folder) as staging:
        save_file(state, staging / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(staging)
        write_json(staging / "config.json", config)
        write_text(
            staging / "README.md",
            f"---\nlibrary_name: {form}\n---\n# A draft exit of {base}\n\nExported by ee-tuning "
            f"in EAGLE-3's layout, as {form} reads it.\n",
        )
        written = load_file(staging / WEIGHTS)
        for name, tensor in state.items():
            if not torch.equal(written[name], tensor):
                raise UserError(f"{name} is another one when it is read back: nothing was exported")
