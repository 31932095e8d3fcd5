"""Heads by the numbers of the module that has them."""

import pytest
from rigs.tiny_lms import HEADS, D, tiny_lm
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from sae.lm.heads import heads_at
from sae.lm.sites import resolve_sites

RECURRENT = {"num_hidden_layers": 3, "lru_width": D}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "options", "path", "heads"),
    [
        ("llama", {}, "model.layers.0.self_attn.o_proj:input", HEADS),
        ("llama", {}, "model.layers.0.self_attn.o_proj", None),  # after the heads were mixed
        ("llama", {}, "model.layers.0.self_attn.q_proj:input", None),
        ("llama", {}, "model.layers.0.mlp.down_proj:input", None),
        ("llama", {"head_dim": 12}, "model.layers.0.self_attn.o_proj:input", HEADS),
        ("gpt2", {}, "transformer.h.0.attn.c_proj:input", HEADS),
        ("gpt2", {}, "transformer.h.0.mlp.c_proj:input", None),
        ("gpt2", {"n_inner": D}, "transformer.h.0.mlp.c_proj:input", None),  # as wide as the heads
        ("gpt_neo", {"attention_types": [[["global"], 2]]}, "transformer.h.0.attn.attention.out_proj:input", HEADS),
        ("bloom", {}, "transformer.h.0.self_attention.dense:input", HEADS),
        ("mpt", {}, "transformer.blocks.0.attn.out_proj:input", HEADS),
        ("modernbert-decoder", {}, "model.layers.0.attn.Wo:input", HEADS),
        ("modernbert-decoder", {}, "model.layers.0.mlp.Wo:input", None),
        ("deepseek_v3", {"v_head_dim": 6}, "model.layers.0.self_attn.o_proj:input", HEADS),
        ("qwen3_5_text", LINEAR, "model.layers.0.linear_attn.out_proj:input", 6),  # not the 4 of the other layers
        ("qwen3_5_text", LINEAR, "model.layers.1.self_attn.o_proj:input", HEADS),
        ("bamba", {"mamba_n_heads": 8, "mamba_d_head": 8}, "model.layers.0.mamba.out_proj:input", None),
        ("bert", {}, "bert.encoder.layer.0.attention.output.dense:input", HEADS),
        ("bert", {}, "bert.encoder.layer.0.output.dense:input", None),
        ("t5", {}, "decoder.block.0.layer.1.EncDecAttention.o:input", HEADS),
        ("bart", {}, "model.decoder.layers.0.encoder_attn.out_proj:input", HEADS),
        ("recurrent_gemma", RECURRENT, "model.layers.2.temporal_block.o_proj:input", HEADS),  # by its class
    ],
)  # fmt: skip
def test_only_heads_side_by_side_have_a_count(kind, options, path, heads):
    if kind == "qwen3_5_text":
        options = {**options, "linear_num_value_heads": 6}
    model = tiny_lm(kind, causal=kind != "t5", **options)
    (site,) = resolve_sites(model, [path])
    assert site.heads == heads


def test_the_count_of_a_wrapped_text_model_is_its_own():
    """The wrapper's config has none, and its vision tower's is another."""
    text = {"model_type": "llama", "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    vision = {"model_type": "clip_vision_model", "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {"intermediate_size": 48, "vocab_size": 99, "num_key_value_heads": HEADS}
    config = LlavaConfig(text_config={**text, **small}, vision_config={**vision, "intermediate_size": 48, "image_size": 28, "patch_size": 14}, image_token_index=98)  # fmt: skip  # noqa: E501
    model = LlavaForConditionalGeneration(config).eval()
    (site,) = resolve_sites(model, ["blocks.1.attn.hook_z"])
    assert (site.hook, site.heads) == ("model.language_model.layers.1.self_attn.o_proj", HEADS)
    tower = next(path for path, _ in model.named_modules() if path.endswith("layers.0.self_attn.out_proj"))
    assert heads_at(model, tower, "input") == 2


def test_numbers_that_do_not_give_the_width_are_not_taken():
    class Attention(nn.Module):
        def __init__(self, **numbers):
            super().__init__()
            self.o_proj = nn.Linear(12, 12)
            vars(self).update(numbers)

    def count(**numbers):
        return heads_at(nn.ModuleDict({"attn": Attention(**numbers)}), "attn.o_proj", "input")

    assert count(num_heads=3, head_dim=4) == 3
    assert count(num_heads=3, head_dim=5) is None
    assert count(num_heads=3) == 3
    assert count(num_heads=5) is None
    assert count() is None
    assert count(num_key_value_heads=3, head_dim=4) is None
