"""Tiny random models of every supported family, for tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", COMMON),
    "llama-tied-bias": ("llama", COMMON | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", COMMON),
    "qwen3": ("qwen3", COMMON | {"head_dim": 8}),
    "mistral": ("mistral", COMMON | {"sliding_window": 6, "head_dim": 8}),
    "gemma": ("gemma", COMMON | {"head_dim": 8}),
    "gemma2": ("gemma2", COMMON | {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "layer_types": HYBRID}),
    "gemma3": ("gemma3_text", COMMON | {"head_dim": 8, "sliding_window": 6, "layer_types": HYBRID}),
    "phi": ("phi", COMMON | {"num_key_value_heads": 4}),
    "phi3": ("phi3", COMMON | {"sliding_window": None}),
    "olmo2": ("olmo2", COMMON),
    "granite": ("granite", COMMON | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "starcoder2": ("starcoder2", COMMON | {"sliding_window": 6}),
    "stablelm": ("stablelm", COMMON | {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", COMMON | {"use_parallel_residual": True}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", {k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")} | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", COMMON | {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-new": ("falcon", COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "cohere": ("cohere", COMMON | {"logit_scale": 0.3}),
    "gpt_bigcode": ("gpt_bigcode", GPT2 | {"multi_query": True}),
    "biogpt": ("biogpt", COMMON | {"scale_embedding": True}),
    "olmo": ("olmo", COMMON),
}  # fmt: skip
# Families that a short test alone has seen, by their model types.
OTHERS: dict[str, dict[str, Any]] = (
    dict.fromkeys(
        ["afmoe", "apertus", "arcee", "bitnet", "ernie4_5", "gpt_neox_japanese", "jais2", "nemotron",
         "olmo3", "smollm3", "diffllama"],
        COMMON,
    )
    | dict.fromkeys(
        ["cohere2", "exaone4", "glm", "glm4", "helium", "hunyuan_v1_dense", "ministral",
         "seed_oss", "vaultgemma"],
        COMMON | {"head_dim": 8},
    )
    | dict.fromkeys(["codegen", "gptj"], GPT2 | {"rotary_dim": 8})
    | {"mpt": {"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2, "max_seq_len": 64}}
    | dict.fromkeys(
        ["deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "granitemoe", "minimax_m2",
         "olmoe", "phimoe", "qwen2_moe"],
        COMMON | {"num_key_value_heads": 4, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
                  "num_experts_per_tok": 2, "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8,
                  "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1,
                  "topk_group": 1, "n_shared_experts": 1, "moe_num_experts": 4, "moe_k": 2},
    )
    | dict.fromkeys(["minicpm3", "persimmon", "youtu"], COMMON | {"num_key_value_heads": 4})
)  # fmt: skip
# They do something to hidden states outside of their layers.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "nanochat": ("nanochat", COMMON),
    "bloom": ("bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "xglm": ("xglm", {"vocab_size": 96, "d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4}),
}  # fmt: skip
# Layers of theirs carry a state from token to token.
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5_text", COMMON | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}),
    "lfm2": ("lfm2", COMMON | {"layer_types": ["conv", "full_attention"] * 2}),
    "falcon_h1": ("falcon_h1", COMMON | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}),
    "rwkv": ("rwkv", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4}),
}  # fmt: skip
# They can be tuned, but not decoded.
UNDECODED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4": ("llama4_text", COMMON | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}),
    "deepseek_v32": ("deepseek_v32", COMMON | {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}),
}  # fmt: skip
MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6, "layer_types": HYBRID, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "qwen3_moe": ("qwen3_moe", COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8, "decoder_sparse_step": 1}),
}  # fmt: skip


def tiny(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of `family`: 4 layers, hidden 32, vocabulary 96, fp32, with every weight random.

    Norms and biases get noise too, so that leaving one out shows.
    """
    others = {name: (name, values) for name, values in OTHERS.items()}
    model_type, values = (FAMILIES | MOE | REFUSED | RECURRENT | UNDECODED | others)[family]
    config = AutoConfig.for_model(model_type, **(values | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif "embed" not in name and "wte" not in name:
                p.mul_(4.0)
    return model
