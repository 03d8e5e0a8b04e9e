"""Tiny random models of many families, from the configurations of the installed transformers."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# model_type -> what is not `SMALL` about its configuration
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral": {"head_dim": 8, "sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**MOE, "head_dim": 8},
    "qwen3_next": {
        **MOE, "head_dim": 8, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "num_hidden_layers": 7},
    "phi": {},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 64},
    "granite": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "cohere": {},
    "smollm3": {},
    "glm4": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
        "mamba_chunk_size": 8, "head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_multiple_of": 8, "conv_L_cache": 3},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "gpt_neox": {},
    "gpt2": GPT,
    "bloom": {"n_head": 4, "n_layer": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
}  # fmt: skip


def config_of(family: str) -> Any:
    """The tiny configuration of a family; None where the installed transformers does not know it."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if family not in CONFIG_MAPPING_NAMES:
        return None
    own = FAMILIES[family]
    return AutoConfig.for_model(family, **(own if own is GPT else {**SMALL, **own}))


def model_of(family: str) -> Any:
    """A random model of a family in fp32, with the attention that `tune` loads it with."""
    import torch
    from transformers import AutoModelForCausalLM

    from unshot.models import attention_of

    config = config_of(family)
    torch.manual_seed(0)
    own = attention_of(config.to_dict())
    net = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, **({"attn_implementation": own} if own else {})
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return net.eval()
