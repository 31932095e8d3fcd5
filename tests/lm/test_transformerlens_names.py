"""TransformerLens' names in the models for which coders are released: the places add up as the stream does."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sae.base.errors import ConfigError
from sae.lm.hooks import capture
from sae.lm.intervene import replace_at
from sae.lm.models import LanguageModel
from sae.lm.site import Site

D, HEADS, D_HEAD = 24, 3, 12  # heads x d_head != d_model
SIZES = {
    "hidden_size": D,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "vocab_size": 30,
    "intermediate_size": 40,
    "num_key_value_heads": HEADS,
    "head_dim": D_HEAD,
    "pad_token_id": 0,
}
SEQUENTIAL = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=D, n_layer=3, n_head=HEADS)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}
PARALLEL = {
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=D, num_hidden_layers=3, num_attention_heads=HEADS, vocab_size=30, intermediate_size=40
        )
    )
}
MODELS = SEQUENTIAL | PARALLEL


@pytest.fixture(params=MODELS, scope="module")
def lm(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases that a norm starts without would hide a mistake
            parameter.add_(0.2 * torch.randn_like(parameter))
    return LanguageModel(model, None, request.param, None, True)


def read(lm, *hooks, layer=1):
    sites = [Site(f"blocks.{layer}.{hook}") for hook in hooks]
    seen = capture(lm, sites, torch.arange(1, 11).reshape(2, 5))
    return [seen[site.name] for site in sites]


def test_the_stream_is_the_sum_of_what_is_written(lm):
    if lm.name in PARALLEL:
        with pytest.raises(ConfigError, match=r"hook_resid_mid.*nothing lies between them"):
            read(lm, "hook_resid_mid")
        before, attention, mlp, after = read(lm, "hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
        torch.testing.assert_close(before + attention + mlp, after)
    else:
        hooks = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
        before, attention, middle, mlp, after = read(lm, *hooks)
        torch.testing.assert_close(before + attention, middle)
        torch.testing.assert_close(middle + mlp, after)
        assert torch.equal(read(lm, "hook_mlp_in")[0], middle)
    assert torch.equal(read(lm, "hook_resid_pre", layer=2)[0], after)


def test_heads_are_read_side_by_side(lm):
    (z,) = read(lm, "attn.hook_z")
    block = lm.model.get_submodule(f"{lm.model.base_model_prefix}.{'h' if lm.name == 'gpt2' else 'layers'}.1")
    out = {"gpt2": "attn.c_proj", "neox": "attention.dense"}.get(lm.name, "self_attn.o_proj")
    made = block.get_submodule(out)(z)
    if lm.name in ("gemma2", "gemma3"):
        made = block.post_attention_layernorm(made)
    torch.testing.assert_close(made, read(lm, "hook_attn_out")[0])
    assert z.shape[-1] == (D if lm.name in ("gpt2", "neox", "qwen2") else HEADS * D_HEAD)


def test_a_norm_is_read_before_its_gain(lm):
    (normalized,) = read(lm, "ln2.hook_normalized")
    source = "hook_resid_pre" if lm.name in PARALLEL else "hook_resid_mid"
    (x,) = read(lm, source)
    centered = x - x.mean(-1, keepdim=True) if lm.name in ("gpt2", "neox") else x
    eps = {"gpt2": 1e-5, "neox": 1e-5}.get(lm.name, 1e-6)
    expected = centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(normalized, expected)
    if lm.name not in PARALLEL:
        gained = read(lm, "mlp.hook_in")[0]
        assert not torch.allclose(gained, normalized, atol=1e-2), "the gain has no effect in this test"


def test_what_comes_before_a_gain_cannot_be_replaced(lm):
    site = Site("blocks.1.ln2.hook_normalized")
    with replace_at(lm.model, site, torch.zeros_like), pytest.raises(ConfigError, match="can be read, not replaced"):
        lm.model(torch.arange(1, 6)[None])


def test_the_embedding_is_what_enters_the_first_layer(lm):
    seen = capture(lm, [Site("hook_embed"), Site("blocks.0.hook_resid_pre")], torch.arange(1, 11).reshape(2, 5))
    if lm.name == "gpt2":
        positions = lm.model.transformer.wpe.weight[:5]
        torch.testing.assert_close(seen["hook_embed"] + positions, seen["blocks.0.hook_resid_pre"])
    else:
        assert torch.equal(seen["hook_embed"], seen["blocks.0.hook_resid_pre"]), "with Gemma's factor sqrt(d)"


def test_a_name_that_this_model_lacks_is_told(lm):
    with pytest.raises(ConfigError, match=r"blocks\.1\.hook_resid_psot.*Did you mean 'hook_resid_post'"):
        read(lm, "hook_resid_psot")
    with pytest.raises(ConfigError, match=r"layers\.7|h\.7"):
        read(lm, "hook_resid_post", layer=7)
