"""From what is typed to module paths, over the architectures people use."""

import re

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from sae.base.errors import ConfigError
from sae.lm.hooks import capture
from sae.lm.models import LanguageModel
from sae.lm.sites import ALIASES, resolve_sites

SIZES = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "vocab_size": 30}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, intermediate_size=32, head_dim=8, num_key_value_heads=2)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES, intermediate_size=32, pad_token_id=0, eos_token_id=0)),
    "glm4": lambda: Glm4ForCausalLM(
        Glm4Config(**SIZES, intermediate_size=32, head_dim=8, num_key_value_heads=2, pad_token_id=0, eos_token_id=0)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=32)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=12, n_head=2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16)),
    "bert": lambda: BertModel(BertConfig(**SIZES, intermediate_size=32)),
}
_built = {}


def model(kind):
    if kind not in _built:
        torch.manual_seed(0)
        _built[kind] = MODELS[kind]().eval()
    return _built[kind]


def names(kind, *typed):
    return [site.name for site in resolve_sites(model(kind), typed)]


@pytest.mark.parametrize(
    ("kind", "typed", "expected"),
    [
        ("llama", "model.layers.3", ["model.layers.3"]),
        ("llama", "layers.3", ["model.layers.3"]),
        ("llama", "layers.1:input", ["model.layers.1:input"]),
        ("llama", "layers.*.mlp", [f"model.layers.{i}.mlp" for i in range(12)]),
        ("llama", "layers.[23]", ["model.layers.2", "model.layers.3"]),
        ("llama", "layers.1?", ["model.layers.10", "model.layers.11"]),
        ("llama", "blocks.3.hook_resid_post", ["model.layers.3"]),
        ("llama", "blocks.3.hook_resid_pre", ["model.layers.3:input"]),
        ("llama", "blocks.3.hook_resid_mid", ["model.layers.3.post_attention_layernorm:input"]),
        ("llama", "blocks.3.hook_attn_out", ["model.layers.3.self_attn"]),
        ("llama", "blocks.3.attn.hook_z", ["model.layers.3.self_attn.o_proj:input"]),
        ("llama", "blocks.3.mlp.hook_post", ["model.layers.3.mlp.down_proj:input"]),
        ("llama", "blocks.*.hook_mlp_out", [f"model.layers.{i}.mlp" for i in range(12)]),
        ("gemma2", "blocks.0.hook_resid_mid", ["model.layers.0.pre_feedforward_layernorm:input"]),
        ("gemma2", "blocks.0.hook_mlp_out", ["model.layers.0.post_feedforward_layernorm"]),
        ("gemma2", "blocks.0.hook_attn_out", ["model.layers.0.post_attention_layernorm"]),
        ("gpt2", "blocks.0.hook_resid_mid", ["transformer.h.0.ln_2:input"]),
        ("gpt2", "blocks.0.attn.hook_z", ["transformer.h.0.attn.c_proj:input"]),
        ("gpt2", "blocks.0.mlp.hook_post", ["transformer.h.0.mlp.c_proj:input"]),
        ("gpt2", "h.11", ["transformer.h.11"]),
        ("neox", "blocks.2.attn.hook_z", ["gpt_neox.layers.2.attention.dense:input"]),
        ("neox", "blocks.2.mlp.hook_post", ["gpt_neox.layers.2.mlp.dense_4h_to_h:input"]),
        ("opt", "blocks.2.hook_resid_post", ["model.decoder.layers.2"]),
        ("opt", "blocks.2.attn.hook_z", ["model.decoder.layers.2.self_attn.out_proj:input"]),
        ("bert", "blocks.2.hook_resid_post", ["encoder.layer.2"]),
        ("bert", "layer.2", ["encoder.layer.2"]),
    ],
)
def test_what_is_typed_is_found(kind, typed, expected):
    assert names(kind, typed) == expected


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("model.layer.3", r"no module 'model\.layer\.3' in this model\. Did you mean 'model\.layers\.3'"),
        ("layers.3.mpl", r"Did you mean .*layers\.3\.mlp"),
        ("layers.12", r"no module 'layers\.12'"),
        ("layers.3:inptu", r"the side is one of output, input, normalized"),
        ("mlp", r"'mlp' is ambiguous: model\.layers\.0\.mlp, .*; write one in full"),
        ("blocks.3.hook_resid_psot", r"Did you mean 'hook_resid_post'"),
        ("blocks.12.hook_resid_post", r"none of model\.layers\.12 is in this model"),
        ("", r"no module ''"),
    ],
)
def test_what_is_not_there_gets_its_nearest_names(typed, message):
    with pytest.raises(ConfigError, match=message):
        names("llama", typed)


def test_a_nearest_name_is_given_once():
    with pytest.raises(ConfigError) as found:
        names("llama", "model.layer.2")
    given = re.findall(r"'(model\.layers[^']*)'", str(found.value))
    assert given[0] == "model.layers.2"
    assert len(set(given)) == len(given) == 3


def test_each_site_once_in_the_order_typed():
    assert names("llama", "layers.3", "layers.1", "blocks.3.hook_resid_post", "layers.3:input") == [
        "model.layers.3",
        "model.layers.1",
        "model.layers.3:input",
    ]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "olmo2", "glm4"])
def test_the_residual_stream_adds_up(kind):
    """Pre + attention = mid and mid + MLP = post: each alias is where TransformerLens says it is."""
    hooks = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    sites = {hook: resolve_sites(model(kind), [f"blocks.1.hook_{hook}"])[0] for hook in hooks}
    lm = LanguageModel(model(kind), None, kind, None, True)
    seen = capture(lm, list(sites.values()), torch.randint(0, 30, (2, 5)))
    x = {hook: seen[site.name] for hook, site in sites.items() if site.name in seen}
    torch.testing.assert_close(x["resid_pre"] + x["attn_out"], x["resid_mid"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x["resid_mid"] + x["mlp_out"], x["resid_post"], atol=1e-5, rtol=1e-5)


def test_only_concatenated_heads_have_a_head_count():
    found = resolve_sites(model("llama"), [f"blocks.0.{alias}" for alias in ALIASES])
    assert {site.name: site.heads for site in found if site.heads} == {"model.layers.0.self_attn.o_proj:input": 2}
    bert = resolve_sites(
        model("bert"), ["encoder.layer.0.attention.output.dense:input", "encoder.layer.0.output.dense:input"]
    )
    assert [site.heads for site in bert] == [2, None]
