"""Small random language models of several families, whose norms have gains (and biases) worth noticing."""

import torch
from rigs.fakes import tiny_tokenizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sae.lm.models import LanguageModel

D = 16
LAYERS = {
    "llama": "model.layers",
    "gemma2": "model.layers",
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "neox": "gpt_neox.layers",
}

ONE_HEAD = {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": None}
NO_IDS = {"bos_token_id": 0, "eos_token_id": 1}


def subject_lm(family: str) -> LanguageModel:
    """Returns a random model of 3 layers and width 16 in float64."""
    tokenizer = tiny_tokenizer()
    common = {"vocab_size": len(tokenizer), "initializer_range": 0.5}
    usual = {
        **common,
        "hidden_size": D,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    torch.manual_seed(3)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**usual))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**usual, **ONE_HEAD))
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**common, n_embd=D, n_layer=3, n_head=2, n_positions=64, **NO_IDS))
    elif family == "bloom":  # which adds to the stream within its modules
        model = BloomForCausalLM(BloomConfig(**common, hidden_size=D, n_layer=3, n_head=2))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**usual))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * (0.3 if "norm" in name or "ln" in name else 0.1))
    model = model.double().eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, family, None, True)
