"""TransformerLens' names in every class of language model that a short table can configure: what is served adds up."""

import contextlib

import pytest
import torch
from rigs.tiny_lms import HEADS, VOCABULARY, D, tiny_lm
from torch._subclasses.fake_tensor import FakeTensorMode

from sae.base.errors import ConfigError
from sae.lm.hooks import capture, site_widths
from sae.lm.models import LanguageModel
from sae.lm.sites import ALIASES, resolve_sites

SUMS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
NAMES = {*SUMS, "hook_mlp_in"}
MIDDLE = {"hook_resid_mid", "hook_mlp_in"}
WRITTEN = {"hook_attn_out", "hook_mlp_out"}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
HEARD = {"hook_attn_out"}

NAMED = """
afmoe apertus arcee aria_text axk1 biogpt bitnet bloom blenderbot cwm ctrl deepseek_v2 deepseek_v3 diffllama ernie4_5
ernie4_5_moe exaone exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_oss
granite helium hunyuan_v1_dense hunyuan_v1_moe jetmoe llama mbart megatron-bert ministral minimax_m2 mistral mixtral
modernbert-decoder moshi mpt nemotron olmo olmo2 olmo3 olmoe pegasus persimmon phi3 phimoe qwen2 qwen2_moe qwen3
qwen3_moe roberta-prelayernorm seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma whisper xglm
"""
CONFIGURED = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {"use_parallel_residual": False},
    "qwen3_next": HYBRID,
    "qwen3_5_text": HYBRID,
    "olmo_hybrid": HYBRID,
}
LACKING = [  # which names models cannot have, and what they are told
    (("codegen", "cohere", "cohere2", "falcon", "gptj", "phi"), {}, MIDDLE, "nothing lies between them"),
    (("gpt_neox", "stablelm"), {"use_parallel_residual": True}, MIDDLE, "nothing lies between them"),
    (("falcon",), {"new_decoder_architecture": True, "num_kv_heads": 2}, MIDDLE, "nothing lies between them"),
    (("granite", "granitemoe"), {"residual_multiplier": 0.22}, WRITTEN, "adds 0.22 times what model.layers"),
    (("minicpm3",), {}, WRITTEN, "times what model.layers"),
    (("mamba", "falcon_mamba", "nemotron_h"), {}, MIDDLE | WRITTEN, "all that"),
    (("mamba2",), {"num_heads": 8, "n_groups": 1}, MIDDLE | WRITTEN, "all that"),
    (("bert", "roberta", "electra", "bart", "openai-gpt"), {}, MIDDLE | WRITTEN, "a norm follows each sum"),
    (("opt",), {"do_layer_norm_before": False}, MIDDLE | WRITTEN, "a norm follows each sum"),
    (("opt",), {}, MIDDLE | {"hook_mlp_out"}, "rows and context as one axis"),
    (("llama4_text",), {}, {"hook_mlp_out"}, "rows and context as one axis"),
    (("bloom",), {"apply_residual_connection_post_layernorm": True}, MIDDLE | WRITTEN, "no tensor x"),
    (("doge", "falcon_h1", "minimax"), {}, MIDDLE | WRITTEN, "no tensor x"),
    (("dory", "hrm_text", "xlnet", "xlm"), {}, NAMES, "no one list of layers"),
    (("bamba",), {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]}, HEARD, "is not attention's"),
    (("lfm2",), {"layer_types": ["conv", "full_attention"]}, HEARD, "is not attention's"),
]
CASES = [(kind, {}, set(), "") for kind in NAMED.split()]
CASES += [(kind, options, set(), "") for kind, options in CONFIGURED.items()]
CASES += [(kind, options, lacks, why) for kinds, options, lacks, why in LACKING for kind in kinds]
TOKENS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))


def read(model, sites):
    """Returns what stands at sites, by hooks of the test's own, for tokens of the test's own."""
    seen, handles = {}, []

    def see(name, x):
        seen[name] = (x if torch.is_tensor(x) else x[0]).clone().flatten(2)

    for name, site in sites.items():
        module = model.get_submodule(site.hook)
        if site.side == "output":
            handles.append(module.register_forward_hook(lambda _m, _a, out, name=name: see(name, out)))
        else:
            given = lambda _m, a, k, name=name: see(name, a[0] if a else k["hidden_states"])  # noqa: E731
            handles.append(module.register_forward_pre_hook(given, with_kwargs=True))
    model(input_ids=TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def served(model, layer):
    """Returns the sites of the names that are served in a layer, and what is said of the others."""
    sites, refused = {}, {}
    for name in ALIASES:
        try:
            (sites[name],) = resolve_sites(model, [f"blocks.{layer}.{name}"])
        except ConfigError as error:
            refused[name] = str(error)
    return sites, refused


def close(found, wanted):
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(error.max()) <= 1e-5
    return True


IDS = [f"{kind}-{number}" for number, (kind, *_) in enumerate(CASES)]


@pytest.mark.parametrize(("kind", "options", "lacks", "why"), CASES, ids=IDS)
def test_what_is_served_adds_up_and_the_rest_is_refused_by_name(kind, options, lacks, why):
    model = tiny_lm(kind, **options)
    after = None
    for layer in range(2):
        sites, refused = served(model, layer)
        here = lacks if layer == 0 or kind not in ("bamba", "lfm2") else set()  # whose second layer has attention
        assert NAMES - set(sites) == here
        for name, said in refused.items():
            assert said.startswith(f"activations.sites: 'blocks.{layer}.{name}'"), said
            assert "\n" not in said
        assert all(why in refused[name] for name in here)
        x = read(model, {name: site for name, site in sites.items() if site.side != "normalized"})
        pre, attention, middle, mlp, post = map(x.get, SUMS)
        if post is None:
            continue
        assert pre.shape == (*TOKENS.shape, D)
        assert after is None or torch.equal(pre, after)
        after = post
        if middle is not None:
            assert torch.equal(x["hook_mlp_in"], middle)
            assert attention is None or close(pre + attention, middle)
            assert mlp is None or close(middle + mlp, post)
            assert not torch.equal(middle, pre)
        elif attention is not None and mlp is not None:
            assert close(pre + attention + mlp, post)
        if "mlp.hook_post" in x:
            assert close(model.get_submodule(sites["mlp.hook_post"].hook)(x["mlp.hook_post"]), x["mlp.hook_out"])
        if "attn.hook_z" in x:
            assert x["attn.hook_z"].shape[-1] % sites["attn.hook_z"].heads == 0
            assert sites["attn.hook_z"].heads == HEADS


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "olmo2", "gemma3_text", "apertus", "mamba", "cohere"])
def test_a_norm_that_is_served_reads_the_stream(kind):
    """Its output is a gain times what is served, plus a bias, both the same for every token."""
    model = tiny_lm(kind)
    lm = LanguageModel(model, None, kind, None, True)
    sites, _ = served(model, 1)
    for name, stream in (("ln1.hook_normalized", "hook_resid_pre"), ("ln2.hook_normalized", "hook_resid_mid")):
        if name not in sites:
            assert kind == "olmo2" or name.startswith("ln2")
            continue
        x = read(model, {"stream": sites[stream]})["stream"]
        norm = model.get_submodule(sites[name].hook)
        normalized = capture(lm, [sites[name]], TOKENS)[sites[name].name]
        bias = norm(torch.zeros(D))
        gain = (norm(x) - bias) / normalized
        torch.testing.assert_close(gain, gain[:1, :1].expand_as(gain), rtol=1e-2, atol=1e-2)
        assert normalized.square().mean() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_places_are_the_same_in_half_precision(dtype):
    for kind, options in (("llama", {}), ("bloom", {}), ("gptj", {}), ("granite", {"residual_multiplier": 0.22})):
        whole, half = (served(tiny_lm(kind, **options).to(d), 1) for d in (torch.float32, dtype))
        assert {n: s.name for n, s in whole[0].items()} == {n: s.name for n, s in half[0].items()}
        assert set(whole[1]) == set(half[1])


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("llama", "model.embed_tokens"),
        ("gemma", "model.embed_tokens"),
        ("gpt2", "transformer.wte"),
        ("bloom", "transformer.word_embeddings_layernorm"),
        ("mamba", "backbone.embeddings"),
        ("mpt", "transformer.wte"),
        ("bert", None),  # a norm stands between
        ("granite", None),  # the model scales it
    ],
)
def test_the_embedding_is_what_a_token_adds_to_the_stream(kind, place):
    model = tiny_lm(kind, **({"embedding_multiplier": 12.0} if kind == "granite" else {}))
    if place is None:
        with pytest.raises(ConfigError, match="'hook_embed': no module makes what a token alone adds"):
            resolve_sites(model, ["hook_embed"])
        return
    (site,) = resolve_sites(model, ["hook_embed"])
    assert site.hook == place
    x = read(model, {"embed": site, "pre": resolve_sites(model, ["blocks.0.hook_resid_pre"])[0]})
    close(x["embed"] + (x["pre"] - x["embed"])[:1], x["pre"])


def test_of_an_encoder_and_a_decoder_the_encoder_is_meant_which_is_what_is_read():
    lm = LanguageModel(tiny_lm("t5", causal=False), None, "t5", None, False)
    sites, _ = served(lm.model, 1)
    assert {site.hook.partition(".")[0] for site in sites.values()} == {"encoder"}
    assert set(sites) >= NAMES
    seen = capture(lm, list({site.name: site for site in sites.values()}.values()), TOKENS)
    pre, attention, middle, mlp, post = (seen[sites[name].name] for name in SUMS)
    assert close(pre + attention, middle)
    assert close(middle + mlp, post)


def test_layers_that_run_again_and_a_model_that_cannot_be_run_are_refused():
    with pytest.raises(ConfigError, match=r"no one list of layers.*albert_layer_groups\.0 runs 4 times"):
        resolve_sites(tiny_lm("albert", causal=False, num_hidden_layers=4), ["blocks.0.hook_resid_post"])
    model = tiny_lm("llama")
    model.model.layers[0].self_attn.o_proj = torch.nn.Linear(3, D)
    with pytest.raises(ConfigError, match=r"'blocks\.0\.hook_attn_out': a pass over a few tokens fails \(RuntimeError"):
        resolve_sites(model, ["blocks.0.hook_attn_out"])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mpt", "bloom", "t5"])
def test_a_model_without_weights_has_a_place_for_every_name(kind):
    """What is estimated before the weights are there needs widths: those of the places that are found with them."""
    widths = []
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode:
            model = tiny_lm(kind, causal=kind != "t5")
            lm = LanguageModel(model, None, kind, None, kind != "t5")
            widths.append({})
            for name in ("hook_embed", *(f"blocks.1.{name}" for name in ALIASES)):
                with contextlib.suppress(ConfigError):
                    (width,) = site_widths(lm, resolve_sites(model, [name])).values()
                    widths[-1][name] = width
    measured, guessed = widths
    assert set(guessed) >= set(measured)
    assert {name for name, width in measured.items() if guessed[name] != width} <= {"blocks.1.mlp.hook_post"}
