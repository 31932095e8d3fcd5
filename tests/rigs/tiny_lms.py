"""A tiny random model of any class of transformers that a short table can configure."""

import inspect

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

VOCABULARY, D, HEADS = 99, 32, 4
SIZES = {
    "mamba_chunk_size": 8,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "d_embed"), D),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff", "d_ff"), 48
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "head_dim", "d_kv", "state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "time_step_rank"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("n_positions", "max_position_embeddings", "max_sequence_length"), 64),
    **dict.fromkeys(("n_group", "topk_group", "bos_token_id"), 1),
    **{"moe_intermediate_size": 24, "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2},
}


def tiny_lm(model_type: str, causal: bool = True, **options):
    """Returns a random model in evaluation mode: 2 layers of width 32, whose norms have gains and biases of note."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    kind = CONFIG_MAPPING[model_type]
    renamed = getattr(kind, "attribute_map", {})
    known = (set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__annotations__", {}))) - set(
        renamed
    )
    config = kind(**{**{name: value for name, value in SIZES.items() if name in known}, **options})
    torch.manual_seed(0)
    model = (AutoModelForCausalLM if causal else AutoModel).from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model
