"""Promoted tokens against finite differences of the models themselves, and decoder neighbors."""

import pytest
import torch
from rigs.fakes import tiny_lm
from rigs.interp_lms import LAYERS, D, subject_lm

from interp.evidence.paths import ways_of
from interp.evidence.promotes import decoder_neighbors, promoted_tokens, token_text
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.lm.hooks import capture
from sae.lm.intervene import add
from sae.lm.site import Site
from sae.lm.sites import resolve_sites
from sae.selection.topk import TopK

TOKENS = torch.tensor([[0, 40, 41, 90, 7, 33]])


def writing(*sites, rows, width=None):
    """A coder that writes the given decoder rows at sites."""
    width = width or rows.shape[1] // len(sites)
    sites = tuple(Site(site.hook, site.side, width=width) for site in sites)
    made = SparseCoder(CoderSpec(4, rows.shape[1], len(rows), TopK(1), (Site("x"),), sites, pre_bias="none"))
    with torch.no_grad():
        made.W_dec.copy_(rows)
    return made


def last(lm, site):
    return capture(lm, [site], TOKENS)[site.name][0, -1]


def without(rows, *fixed):
    """Rows without their components along some vectors: to first order, the scale of a norm stands."""
    basis = torch.linalg.qr(torch.stack(fixed).double().T).Q
    return rows - rows @ basis @ basis.T


def raised(lm, sites, row, size=1e-2):
    """The change of the last logits for a unit of a direction, by a finite difference."""
    with torch.no_grad(), add(lm.model, sites, size * row):
        up = lm.model(TOKENS).logits[0, -1]
    with torch.no_grad(), add(lm.model, sites, -size * row):
        return (up - lm.model(TOKENS).logits[0, -1]) / (2 * size)


def extremes(lm, change, count):
    order = change.argsort(descending=True).tolist()
    texts = [tuple(token_text(lm.tokenizer, token) for token in some) for some in (order, order[::-1])]
    return texts[0][:count], texts[1][:count]


@pytest.mark.parametrize("family", LAYERS)
def test_the_ranking_is_that_of_the_models_own_logits(family):
    lm = subject_lm(family)
    site = resolve_sites(lm.model, ["blocks.2.hook_resid_post"])[0]
    stream = last(lm, site)
    centered = family in ("gpt2", "neox", "bloom")
    rows = without(torch.randn(5, D).double() + 0.5, stream - stream.mean() if centered else stream)
    assert rows.mean(1).abs().max() > 0.2, "or centering would not be tried"
    found = promoted_tokens(lm, writing(site, rows=rows), range(5), 6)
    for row, got in zip(rows, found, strict=True):
        change = raised(lm, [site], row)
        assert got == extremes(lm, change, 6)
    plain = extremes(lm, rows[0] @ lm.model.get_output_embeddings().weight.T, 6)
    assert found[0] != plain, "the gain matters here"


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("name", ["attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out", "attention", "mlp"])
def test_what_is_written_below_goes_to_the_stream_as_the_model_takes_it(family, name):
    lm = subject_lm(family)
    below = {
        "attention": {"gpt2": "attn", "neox": "attention", "bloom": "self_attention"}.get(family, "self_attn"),
        "mlp": "mlp",
    }
    typed = f"{LAYERS[family]}.2.{below[name]}" if name in below else f"blocks.2.{name}"
    site = resolve_sites(lm.model, [typed])[0]
    attention = "att" in name
    after = "blocks.2.hook_resid_mid" if attention and family != "neox" else "blocks.2.hook_resid_post"
    stream = resolve_sites(lm.model, [after])[0]
    rows = torch.randn(3, last(lm, site).shape[0]).double()
    if family == "gemma2" and not site.hook.endswith("layernorm"):  # a norm follows: hold its scale
        norm = "post_attention_layernorm" if attention else "post_feedforward_layernorm"
        inner = last(lm, Site(f"model.layers.2.{norm}", "input"))
        is_inner = site.side == "input"
        rows = without(rows, lm.model.get_submodule(site.hook).weight.T @ inner if is_inner else inner)
    made = ways_of(lm.model, writing(site, rows=rows))(rows)
    for row, got in zip(rows, made, strict=True):
        ends = []
        for size in (1e-2, -1e-2):
            with add(lm.model, [site], size * row):
                ends.append(last(lm, stream))
        change = (ends[0] - ends[1]) / 2e-2
        assert torch.nn.functional.cosine_similarity(change, got.double(), dim=0) > 0.9999


@pytest.mark.parametrize(
    "name",
    ["blocks.1.mlp.hook_in", "model.layers.1.input_layernorm", "model.layers.1.self_attn.q_proj", "model.embed_tokens"],
)
def test_what_is_not_linear_in_the_stream_promotes_nothing(name):
    lm = subject_lm("llama")
    coder = writing(resolve_sites(lm.model, [name])[0], rows=torch.randn(2, D))
    assert promoted_tokens(lm, coder, [0, 1]) == [((), ()), ((), ())]


def test_norms_that_read_the_stream_are_the_stream():
    lm = subject_lm("llama")
    rows = torch.randn(2, D)
    expected = promoted_tokens(lm, writing(Site("model.layers.1"), rows=rows), [0, 1])
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert promoted_tokens(lm, writing(Site(f"model.layers.2.{name}", "input"), rows=rows), [0, 1]) == expected


def test_several_sites_add_up_and_the_stream_holds_what_was_before_it():
    lm = subject_lm("llama")
    a, b = torch.randn(2, 3, D)
    mlps = (Site("model.layers.1.mlp"), Site("model.layers.0.mlp"))
    both = torch.cat([a, b], 1)
    one = Site("model.layers.2")
    assert promoted_tokens(lm, writing(*mlps, rows=both), range(3)) == promoted_tokens(
        lm, writing(one, rows=a + b), range(3)
    )
    stream = (Site("model.layers.2"), Site("model.layers.1"))
    assert promoted_tokens(lm, writing(*stream, rows=both), range(3)) == promoted_tokens(
        lm, writing(one, rows=a), range(3)
    )
    bloom = subject_lm("bloom")  # whose modules add what they make to the stream themselves
    for later, earlier in (("2.mlp", "1.mlp"), ("2.self_attention", "1"), ("2.self_attention", "2.input_layernorm")):
        side = "input" if "norm" in earlier else "output"
        sites = (Site(f"transformer.h.{later}"), Site(f"transformer.h.{earlier}", side))
        assert promoted_tokens(bloom, writing(*sites, rows=both), range(3)) == promoted_tokens(
            bloom, writing(Site("transformer.h.2"), rows=a), range(3)
        )
    gemma = subject_lm("gemma2")
    assert promoted_tokens(gemma, writing(*mlps, rows=both), [0]) == [((), ())], (
        "how its norms scale the two is not known"
    )


def test_latents_that_write_nothing_promote_nothing_and_pieces_change_nothing(monkeypatch):
    lm = subject_lm("gpt2")
    coder = writing(Site("transformer.h.2"), rows=torch.randn(9, D))
    with torch.no_grad():
        coder.W_dec[4] = 0
    whole = promoted_tokens(lm, coder, [8, 4, 0], 7)
    assert whole[1] == ((), ())
    assert len(whole[0][0]) == len(whole[0][1]) == 7
    monkeypatch.setattr("interp.evidence.promotes.LATENTS", 2)
    monkeypatch.setattr("interp.evidence.promotes.PIECE", 5)
    assert promoted_tokens(lm, coder, [8, 4, 0], 7) == whole
    assert len(promoted_tokens(lm, coder, [8], 10**6)[0][0]) == len(lm.tokenizer)
    assert promoted_tokens(lm, coder, []) == []


def test_models_without_an_unembedding_promote_nothing():
    lm = subject_lm("llama")
    bare = type(lm)(lm.model.model, lm.tokenizer, "bare", None, False)
    assert promoted_tokens(bare, writing(Site("layers.1"), rows=torch.randn(1, D)), [0]) == [((), ())]


def test_tokens_keep_their_space():
    class Pieces:
        def convert_ids_to_tokens(self, token):
            return ("\u2581the", "the", "\u2581")[token]

        def decode(self, tokens):
            return ("the", "the", " ")[tokens[0]]

    assert [token_text(Pieces(), token) for token in range(3)] == [" the", "the", " "]


def test_neighbors_are_the_nearest_decoders(monkeypatch):
    rows = torch.randn(30, D) * torch.rand(30, 1) * 5
    rows[7] = 0
    coder = writing(Site("x"), rows=rows)
    unit = torch.nn.functional.normalize(rows, dim=1)
    cosines = unit @ unit.T
    monkeypatch.setattr("interp.evidence.promotes.CHUNK_ENTRIES", 60)
    for latent, found in zip([3, 29, 7], decoder_neighbors(coder, [3, 29, 7], 5), strict=True):
        others = [i for i in cosines[latent].argsort(descending=True, stable=True).tolist() if i != latent]
        assert latent not in [other for other, _ in found]
        if latent == 7:
            assert [cosine for _, cosine in found] == [0.0] * 5
            continue
        assert [other for other, _ in found] == others[:5]
        assert [cosine for _, cosine in found] == pytest.approx(cosines[latent][others[:5]].tolist(), abs=1e-5)
    assert len(decoder_neighbors(coder, [0], 100)[0]) == 29


def test_neighbors_of_a_cross_layer_coder_compare_what_both_write():
    sites = [tuple(Site(f"{side}{i}", width=4) for i in range(3)) for side in "rw"]
    spec = CoderSpec(12, 12, 6, TopK(1), *sites, cross_layer=True, pre_bias="none", decoder_norm="free")
    coder = SparseCoder(spec)
    with torch.no_grad():
        coder.W_dec.copy_(torch.randn(coder.W_dec.shape))
    rows = torch.zeros(6, 12)
    for latent in range(6):  # two latents a layer; layer l writes the columns from 4 l on
        rows[latent, 4 * (latent // 2) :] = coder.decoders()[latent // 2][latent % 2].detach()
    unit = torch.nn.functional.normalize(rows, dim=1)
    for latent, found in enumerate(decoder_neighbors(coder, range(6), 5)):
        for other, cosine in found:
            assert cosine == pytest.approx(float(unit[latent] @ unit[other]), abs=1e-5)
        assert [cosine for _, cosine in found] == sorted((cosine for _, cosine in found), reverse=True)


def test_scales_of_sites_count_where_several_are_added():
    lm = subject_lm("llama")
    rows = torch.randn(3, 2 * D)
    sites = tuple(Site(f"model.layers.{i}.mlp", width=D, scale=scale) for i, scale in ((0, 1.0), (1, 4.0)))
    scaled = Normalization("scalar", 2.0)
    spec = CoderSpec(2 * D, 2 * D, 3, TopK(1), sites, sites, pre_bias="none", normalization=scaled)
    coder = SparseCoder(spec)
    with torch.no_grad():
        coder.W_dec.copy_(rows)
    summed = rows[:, :D] + rows[:, D:] / 4
    assert promoted_tokens(lm, coder, range(3)) == promoted_tokens(
        lm, writing(Site("model.layers.2"), rows=summed), range(3)
    )


def test_half_precision_is_no_hindrance():
    lm = tiny_lm()
    coder = writing(Site("model.layers.1"), rows=torch.randn(2, D))
    expected = promoted_tokens(lm, coder, [0, 1], 3)
    lm.model.to(torch.bfloat16)
    assert [up[0] for up, _ in promoted_tokens(lm, coder, [0, 1], 3)] == [up[0] for up, _ in expected]
