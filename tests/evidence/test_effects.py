"""Direct effects against the models' own modules: their norms with the scale held, and their unembeddings."""

from dataclasses import replace

import pytest
import torch
from rigs.interp_lms import LAYERS, D, subject_lm
from rigs.tiny_lms import tiny_lm as any_lm

from interp.evidence.effects import DirectEffects, Entries
from interp.evidence.paths import NoPath, final_norm
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.kernels.codes import SparseLatents
from sae.lm.hooks import capture
from sae.lm.intervene import add
from sae.lm.models import LanguageModel
from sae.lm.site import SECOND, Site
from sae.lm.sites import resolve_sites
from sae.selection.topk import TopK

TOKENS = torch.tensor([[5, 40, 41, 90, 7, 33]])
D_SAE = 12


def coder_of(reads, writes, width=D, d_out=None, **spec):
    """A coder with weights of note in every part, of which at most three of twelve latents fire at a token."""
    torch.manual_seed(5)
    sides = [
        tuple(Site(s.hook, s.side, tag=s.tag, scale=s.scale, width=width) for s in some) for some in (reads, writes)
    ]
    d_in, d_out = (sum(site.width for site in some) for some in sides)
    made = SparseCoder(CoderSpec(d_in, d_out, D_SAE, TopK(3), *sides, pre_bias="none", decoder_norm="free", **spec))
    for parameter in made.parameters():
        parameter.data.normal_()
    return made.requires_grad_(False)


def effects_of(lm, coder):
    """Runs a coder in a model; returns its effects there, what it reads, and its codes."""
    direct = DirectEffects(lm, coder)
    seen = direct.run(lm, list(coder.spec.reads), TOKENS)
    x = torch.cat([seen[site.name][0] for site in coder.spec.reads], dim=-1)
    return direct.measured(), x, SparseLatents.from_dense(coder.encode_dense(x))


def held(lm, x, changed):
    """What a model's norm makes of a changed input, its scale that of the input as it was: the module is run."""
    norm = lm.model.get_submodule(final_norm(lm.model))
    return held_norm(norm, x, changed)


def held_norm(norm, x, changed):
    centered = getattr(norm, "bias", None) is not None
    bias = norm.bias if centered else 0.0

    def size(v):
        v = v - v.mean(-1, keepdim=True) if centered else v
        eps = next(value for name, value in vars(norm).items() if "eps" in name)
        return (v.square().mean(-1, keepdim=True) + eps).sqrt()

    return (norm(changed) - bias) * size(changed) / size(x) + bias


def logits_of(lm, normed):
    made = lm.model.get_output_embeddings()(normed)[..., : len(lm.tokenizer)]
    return made - made.mean(-1, keepdim=True)


def check(lm, coder, change_in_stream, tolerance=1e-4):
    """Each entry's effect is what the logits lose when the stream loses it; the extremes are those of that."""
    measured, x, z = effects_of(lm, coder)
    stream = capture(lm, [Site(final_norm(lm.model), "input")], TOKENS)[f"{final_norm(lm.model)}:input"][0]
    plain = logits_of(lm, held(lm, stream, stream))
    entries = Entries(z.tokens, z.ids, z.values)
    targets = torch.arange(len(z.ids)) * 7 % len(lm.tokenizer)
    found, (up, down) = measured.on(entries, targets), measured.extremes(entries, 5)
    outs = coder.decode(z, x)
    for place, (token, target) in enumerate(zip(z.tokens.tolist(), targets.tolist(), strict=True)):
        without = z.values.clone()
        without[place] = 0
        written = outs[token] - coder.decode(SparseLatents(z.offsets, z.ids, without, z.d_sae), x)[token]
        changed = stream[token] - change_in_stream(written.double(), token)
        wanted = plain[token] - logits_of(lm, held(lm, stream[token], changed))
        scale = float(wanted.abs().max())
        assert float(z.values[place]) > 0
        assert scale > 1e-3
        assert float(found[place]) == pytest.approx(float(wanted[target]), abs=tolerance * scale)
        order = wanted.argsort(descending=True).tolist()
        assert (up.ids[place].tolist(), down.ids[place].tolist()) == (order[:5], order[::-1][:5])
        torch.testing.assert_close(
            up.values[place].double(), wanted[order[:5]].double(), atol=tolerance * scale, rtol=0
        )
        torch.testing.assert_close(
            down.values[place].double(), wanted[order[::-1][:5]].double(), atol=tolerance * scale, rtol=0
        )
    return measured, stream, x, z


@pytest.mark.parametrize("family", LAYERS)
def test_an_effect_is_what_the_logits_lose_with_later_blocks_bypassed(family):
    lm = subject_lm(family)
    site = resolve_sites(lm.model, ["blocks.1.hook_resid_post"])[0]
    check(lm, coder_of([site], [site]), lambda written, token: written)


@pytest.mark.parametrize("family", LAYERS)
def test_effects_add_up_to_the_logit_with_bias_error_and_the_rest_of_the_stream(family):
    lm = subject_lm(family)
    site = resolve_sites(lm.model, ["blocks.1.hook_resid_post"])[0]
    coder = coder_of([site], [site])
    measured, x, z = effects_of(lm, coder)
    final = f"{final_norm(lm.model)}:input"
    stream = capture(lm, [Site(final_norm(lm.model), "input")], TOKENS)[final][0]
    own = lm.model(TOKENS).logits[0, :, : len(lm.tokenizer)].double()
    own = own - own.mean(-1, keepdim=True)
    entries = Entries(z.tokens, z.ids, z.values)
    for target in (3, 50, 99):
        targets = torch.full((len(z.ids),), target)
        latents = torch.zeros(len(stream)).index_add(0, z.tokens, measured.on(entries, targets))
        error = x - coder.decode(z)
        rest = (stream - x) + error + coder.b_dec  # what later layers, the coder's error and its bias make
        parts = logits_of(lm, held(lm, stream, rest))[:, target]  # with what the norm and the unembedding add
        torch.testing.assert_close(latents.double() + parts, own[:, target], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(measured.logits(targets[:6]).double(), own[:, target], atol=2e-4, rtol=1e-4)
    assert measured.direct.likeliest == int(own[-1].argmax())


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("name", ["attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out"])
def test_what_is_written_below_the_stream_goes_there_as_the_model_takes_it(family, name):
    lm = subject_lm(family)
    site = resolve_sites(lm.model, [f"blocks.1.{name}"])[0]
    width = capture(lm, [site], TOKENS)[site.name].shape[-1]
    read = resolve_sites(lm.model, ["blocks.1.hook_resid_pre"])[0]
    coder = coder_of([read], [site]) if width == D else coder_of([site], [site], width)
    after = "blocks.1.hook_resid_mid" if "attn" in name and family != "neox" else "blocks.1.hook_resid_post"
    stream = resolve_sites(lm.model, [after])[0]

    def change(written, token):
        if family == "gemma2":  # a norm follows: its scale is held
            if site.side == "input":
                written = lm.model.get_submodule(site.hook)(written)
            norm = f"model.layers.1.{'post_attention_layernorm' if 'attn' in name else 'post_feedforward_layernorm'}"
            if site.hook == norm:
                return written
            inner = capture(lm, [Site(norm, "input")], TOKENS)[f"{norm}:input"][0, token]
            module = lm.model.get_submodule(norm)
            return held_norm(module, inner, inner) - held_norm(module, inner, inner - written)
        keep = torch.arange(TOKENS.shape[1])[None] == token
        with add(lm.model, [site], -written, keep):
            changed = capture(lm, [stream], TOKENS)[stream.name]
        return (capture(lm, [stream], TOKENS)[stream.name] - changed)[0, token]

    check(lm, coder, change)


def test_norms_behind_inner_modules_have_the_scale_of_their_token():
    lm = subject_lm("gemma2")
    mlp = Site("model.layers.1.mlp")

    def change(written, token):
        norm = "model.layers.1.post_feedforward_layernorm"
        inner = capture(lm, [Site(norm, "input")], TOKENS)[f"{norm}:input"][0, token]
        module = lm.model.get_submodule(norm)
        return held_norm(module, inner, inner) - held_norm(module, inner, inner - written)

    check(lm, coder_of([mlp], [mlp]), change)


def test_a_softcap_is_left_out_and_the_logits_are_still_told():
    lm = subject_lm("gemma2")
    site = Site("model.layers.1")
    plain, *_ = effects_of(lm, coder_of([site], [site]))
    lm.model.config.final_logit_softcapping = 5.0
    capped, *_ = effects_of(lm, coder_of([site], [site]))
    targets = torch.arange(6)
    assert float(lm.model(TOKENS).logits.abs().max()) <= 5.0
    assert torch.equal(plain.logits(targets), capped.logits(targets))
    assert capped.factor == 1.0


@pytest.mark.parametrize(("kind", "options"), [("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 3.0})])
def test_what_a_model_multiplies_its_logits_by_is_measured(kind, options):
    model = any_lm(kind, **options)
    lm = replace(subject_lm("llama"), model=model)
    site = Site("model.layers.0", width=32)
    measured, *_ = effects_of(lm, coder_of([site], [site], 32))
    assert measured.factor == pytest.approx(options.get("logit_scale", 1 / options.get("logits_scaling", 1)), rel=1e-4)
    own = model(TOKENS).logits[0, :, : len(lm.tokenizer)]
    targets = torch.tensor([3, 9, 27, 81, 4, 50])
    wanted = (own - own.mean(-1, keepdim=True))[torch.arange(6), targets]
    torch.testing.assert_close(measured.logits(targets), wanted, atol=1e-4, rtol=1e-3)


def test_what_a_model_multiplies_its_branches_by_counts():
    model = any_lm("granite", residual_multiplier=0.22)
    lm = replace(subject_lm("llama"), model=model)
    found = []
    for site in (Site("model.layers.0.mlp", width=32), Site("model.layers.0", width=32)):
        read = Site("model.layers.0", "input", width=32)
        measured, _, z = effects_of(lm, coder_of([read], [site], 32))
        found.append(measured.on(Entries(z.tokens, z.ids, z.values), torch.arange(len(z.ids))))
    torch.testing.assert_close(found[0], 0.22 * found[1])


@pytest.mark.parametrize("normalization", ["scalar", "layer_norm", "l2", "center"])
def test_normalization_is_undone_with_the_tokens_own_scale(normalization):
    lm = subject_lm("llama")
    site = Site("model.layers.1")
    coder = coder_of(
        [site], [site], normalization=Normalization(normalization, 2.0 if normalization == "scalar" else 1.0)
    )
    check(lm, coder, lambda written, token: written)


def test_several_sites_add_up_and_the_stream_holds_what_was_before_it():
    lm = subject_lm("llama")
    streams = [Site("model.layers.0"), Site("model.layers.1")]
    check(lm, coder_of(streams, streams), lambda written, token: written[D:])
    mlps = [Site(f"model.layers.{n}.mlp") for n in range(3)]
    reads = [Site(f"model.layers.{n}.mlp", "input") for n in range(3)]
    crossing = coder_of(reads, mlps, cross_layer=True)
    check(lm, crossing, lambda written, token: written.view(3, D).sum(0))
    skips = coder_of(reads[:1], mlps[:1], skip=True)
    check(lm, skips, lambda written, token: written)
    gemma = subject_lm("gemma2")

    def change(written, token):
        total = 0.0
        for number, part in enumerate(written.view(2, D)):
            norm = f"model.layers.{number}.post_feedforward_layernorm"
            inner = capture(gemma, [Site(norm, "input")], TOKENS)[f"{norm}:input"][0, token]
            module = gemma.model.get_submodule(norm)
            total = total + held_norm(module, inner, inner) - held_norm(module, inner, inner - part)
        return total

    check(gemma, coder_of(mlps[:2], mlps[:2]), change)


def test_of_two_models_the_effect_is_in_the_first():
    lm = subject_lm("llama")
    sites = [Site("model.layers.1"), Site("model.layers.1", tag=SECOND)]
    coder = coder_of(sites, sites)
    direct = DirectEffects(lm, coder)
    direct.run(lm, [sites[0]], TOKENS)
    found = direct.measured().on(Entries(*torch.tensor([[2], [4]]), torch.ones(1)), torch.tensor([9]))
    alone = coder_of(sites[:1], sites[:1])
    alone.W_dec.data.copy_(coder.W_dec[:, :D])
    measured, *_ = effects_of(lm, alone)
    assert torch.equal(found, measured.on(Entries(*torch.tensor([[2], [4]]), torch.ones(1)), torch.tensor([9])))


def test_pieces_change_nothing_and_no_entry_has_no_effect(monkeypatch):
    lm = subject_lm("llama")
    site = Site("model.layers.1")
    measured, _, z = effects_of(lm, coder_of([site], [site]))
    entries, targets = Entries(z.tokens, z.ids, z.values), torch.arange(len(z.ids))
    whole, sides = measured.on(entries, targets), measured.extremes(entries, 4)
    monkeypatch.setattr("interp.evidence.effects.HELD", 3 * D)
    monkeypatch.setattr("interp.evidence.effects.PIECE", 5)
    torch.testing.assert_close(measured.on(entries, targets), whole)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(measured.extremes(entries, 4), sides, strict=True))
    none = Entries(z.tokens[:0], z.ids[:0], z.values[:0])
    assert measured.on(none, targets[:0]).tolist() == []


def test_half_precision_is_close():
    lm = subject_lm("llama")
    site = Site("model.layers.1")
    coder = coder_of([site], [site])
    _, _, z = effects_of(lm, coder)
    entries, targets = Entries(z.tokens, z.ids, z.values), torch.arange(len(z.ids))
    plain = effects_of(lm, coder)[0].on(entries, targets)
    lm.model.to(torch.bfloat16)
    half = effects_of(lm, coder)[0].on(entries, targets)
    assert float((half - plain).norm() / plain.norm()) < 0.03


@pytest.mark.parametrize(
    ("site", "why"),
    [
        (Site("model.layers.1.mlp", "input"), "not reach the residual stream linearly"),
        (Site("model.layers.1.input_layernorm", "normalized"), "not reach the residual stream linearly"),
        (Site("model.layers.1", tag=SECOND), "writes nothing to this model"),
    ],
)
def test_where_there_is_no_way_it_says_why(site, why):
    with pytest.raises(NoPath, match=why):
        DirectEffects(subject_lm("llama"), coder_of([site], [site]))


def test_models_that_make_logits_in_another_way_are_told_of():
    lm = subject_lm("llama")
    site = Site("model.layers.1")
    bare = LanguageModel(lm.model.model, lm.tokenizer, "bare", None, False)
    with pytest.raises(NoPath, match="predicts no next token"):
        DirectEffects(bare, coder_of([Site("layers.1")], [Site("layers.1")]))
    head = lm.model.lm_head
    head.register_forward_hook(lambda module, args, out: out + torch.arange(out.shape[-1]) * (out.ndim > 2))
    direct = DirectEffects(lm, coder_of([site], [site]))
    direct.run(lm, [site], TOKENS)
    with pytest.raises(NoPath, match="more than its final norm"):
        direct.measured()
