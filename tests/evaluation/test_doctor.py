"""The doctor: every mistake planted on a small coder that was fit to its place, and what it says of a healthy one."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from rigs.fakes import tiny_lm, tiny_text_folder, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import sae
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.evaluation.alternatives import rebuilt
from sae.evaluation.doctor import diagnose, observe, rows_of_text
from sae.evaluation.metrics import fvu
from sae.lm.masking import MaskSpec
from sae.lm.models import LanguageModel
from sae.lm.site import SECOND, Site
from sae.selection.gradient_topk import GradientTopK
from sae.selection.jumprelu import JumpReLU
from sae.selection.relu import ReLU
from sae.selection.topk import TopK
from sae.text.documents import TextConfig

D, LATENTS, K, TOKENS = 16, 64, 4, 1024
BLOCK, MLP, MLP_IN = Site("model.layers.1"), Site("model.layers.1.mlp"), Site("model.layers.1.mlp", "input")
BARE = Site("model.layers.1.post_attention_layernorm", "normalized")
LAYER, SIDE, SCALE, BIAS, SELECTION = (
    "layer off by one",
    "input and output swapped",
    "input scale",
    "pre-bias",
    "selection",
)
GAIN, CENTER = "norm's gain (processed weights)", "centering (processed weights)"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(tiny_text_folder(tmp_path_factory.mktemp("text"), documents=100))


@pytest.fixture(scope="module")
def lm():
    made = tiny_lm()
    for name, parameter in made.model.named_parameters():
        if "norm" in name:  # gains that matter
            parameter.copy_(torch.linspace(0.1, 1.7, len(parameter)))
    return made


def fit(lm, text, reads, writes=None, steps=120, l1=0.0, **spec):
    """A coder trained for a moment on the very text that the doctor reads."""
    torch.manual_seed(0)
    writes = writes or reads
    spec = {"selection": TopK(K), "reads": (reads,), "writes": (writes,)} | spec
    coder = SparseCoder(CoderSpec(D, D, LATENTS, **spec))
    subject = observe(lm, coder.spec, rows_of_text(lm, coder.spec, 2 * TOKENS, text))
    x, target = subject.columns((reads,)), subject.columns((writes,))
    with torch.no_grad():
        y, wanted = coder.spec.normalize(x)[0], coder.spec.normalize_target(target)
        coder.W_enc.copy_(torch.nn.functional.normalize(torch.randn(LATENTS, D), dim=1))
        coder.W_dec.copy_(coder.W_enc)
        coder.b_dec.copy_(wanted.mean(0))
        if coder.spec.pre_bias == "none":
            coder.b_enc.copy_(-coder.W_enc @ y.mean(0))
    optimizer = torch.optim.Adam(coder.parameters(), 5e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        out, latents = coder(x[rows])
        errors = coder.spec.normalize_target(out - target[rows]).square().mean()
        loss = errors + l1 * latents.values.sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return coder.requires_grad_(False)


@pytest.fixture(scope="module")
def coders(lm, text):
    spec = CoderSpec(D, D, LATENTS, TopK(K), (BLOCK,), (BLOCK,))
    norms = observe(lm, spec, rows_of_text(lm, spec, TOKENS, text)).columns((BLOCK,)).norm(dim=1)
    scaled = Normalization("scalar", D**0.5 / float(norms.mean()))
    return {
        "block": fit(lm, text, BLOCK),
        "biasless": fit(lm, text, BLOCK, pre_bias="none"),
        "scaled": fit(lm, text, BLOCK, normalization=scaled),
        "relu": fit(lm, text, BLOCK, selection=ReLU(), l1=0.02, normalization=scaled),
        "mlp": fit(lm, text, MLP),
        "transcoder": fit(lm, text, MLP_IN, MLP, 300, pre_bias="none"),
        "processed": fit(lm, text, BARE, MLP, 300, pre_bias="none"),
        "own": fit(lm, text, MLP_IN, MLP, pre_bias="own"),
    }


@contextmanager
def loud(lm):
    """While open, one letter is an outlier by norm; gives its token."""
    token = lm.tokenizer.encode("h")[-1]
    embedding = lm.model.get_input_embeddings().weight[token]
    before = embedding.clone()
    try:
        embedding *= 1e4
        yield token
    finally:
        embedding.copy_(before)


@pytest.fixture(autouse=True)
def small_ks(monkeypatch):
    monkeypatch.setattr("sae.evaluation.alternatives.KS", (2, 4, 8, 16))


def planted(coder, **changes):
    return rebuilt(coder, coder.spec.with_(**changes))


def at(name, side="output"):
    return {"reads": (Site(name, side),), "writes": (Site(name, side),)}


@pytest.mark.parametrize("name", ["block", "biasless", "scaled", "relu", "mlp", "transcoder", "processed", "own"])
def test_a_coder_where_it_belongs_is_healthy(coders, lm, text, name):
    report = diagnose(coders[name], lm, TOKENS, text)
    assert report.healthy, report.verdict
    assert report.verdict.startswith("healthy")
    assert report.score < min(candidate.score for candidate in report.candidates)
    assert report.advertised_l0 == (None if name == "relu" else K)


PLANTS = [
    ("block", at("model.layers.0"), LAYER, 'site="model.layers.1"'),
    ("block", at("model.layers.2"), LAYER, 'site="model.layers.1"'),
    ("block", at("model.layers.1", "input"), SIDE, 'site="model.layers.1"'),
    ("mlp", at("model.layers.1.mlp", "input"), SIDE, 'site="model.layers.1.mlp"'),
    ("mlp", at("model.layers.2.mlp"), LAYER, 'site="model.layers.1.mlp"'),
    ("transcoder", at("model.layers.1.mlp"), SIDE, 'site="model.layers.1.mlp:input->model.layers.1.mlp"'),
    ("scaled", {"normalization": Normalization()}, SCALE, "scale=0.0"),
    ("block", {"normalization": Normalization("scalar", 0.02)}, SCALE, "normalization none"),
    ("block", {"pre_bias": "none"}, BIAS, 'pre_bias="decoder"'),
    ("biasless", {"pre_bias": "decoder"}, BIAS, 'pre_bias="none"'),
    ("transcoder", {"pre_bias": "decoder"}, BIAS, 'pre_bias="none"'),
    ("block", {"selection": ReLU()}, SELECTION, "selection topk (k="),
    ("block", {"selection": ReLU(), "metrics": {"advertised": {"l0": K}}}, SELECTION, "selection topk (k=4)"),
    ("processed", {"reads": (MLP_IN,)}, GAIN, 'site="model.layers.1.post_attention_layernorm:normalized->'),
    ("transcoder", {"reads": (BARE,)}, GAIN, 'site="model.layers.1.post_attention_layernorm->'),
]


@pytest.mark.parametrize(("name", "changes", "mistake", "change"), PLANTS)
def test_a_planted_mistake_is_found(coders, lm, text, name, changes, mistake, change):
    report = diagnose(planted(coders[name], **changes), lm, TOKENS, text)
    best = report.candidates[0]
    assert not report.healthy
    assert mistake in best.mistake.split(" or "), report.lines()
    assert change in best.change
    assert report.verdict.startswith(f"{best.mistake}: {best.change} gives EV")
    cured = diagnose(best.coder, lm, TOKENS, text)
    assert cured.healthy
    assert cured.ev == pytest.approx(best.ev, abs=1e-6)
    assert not any(" + " in candidate.mistake for candidate in report.candidates)  # a second change would not help


def test_k_is_the_advertised_one_and_else_about_right(coders, lm, text):
    relu = planted(coders["block"], selection=ReLU(), metrics={"advertised": {"l0": K}})
    assert diagnose(relu, lm, TOKENS, text).candidates[0].coder.spec.selection == TopK(k=K)
    found = diagnose(planted(relu, metrics={}), lm, TOKENS, text).candidates[0]
    assert K <= found.coder.spec.selection.k <= 2 * K


def test_a_threshold_for_all_latents_has_the_advertised_l0(coders, lm, text):
    relu = planted(coders["block"], selection=ReLU(), metrics={"advertised": {"l0": 6}})
    rules = {
        type(c.coder.spec.selection): c for c in diagnose(relu, lm, TOKENS, text).candidates if c.mistake == SELECTION
    }
    assert rules.keys() == {TopK, JumpReLU}
    assert rules[JumpReLU].l0 == pytest.approx(6, rel=0.1)
    assert "threshold=" in rules[JumpReLU].change


def test_the_scale_that_was_lost_is_measured_in_all_usual_ways(coders, lm, text):
    coder = planted(coders["scaled"], normalization=Normalization())
    with loud(lm):
        subject = observe(lm, coder.spec, rows_of_text(lm, coder.spec, TOKENS, text))
        found = diagnose(coder, lm, TOKENS, text).candidates
    scales = {c.coder.spec.reads[0].scale for c in found if c.coder.spec.normalization.kind == "scalar"}
    for every in (False, True):
        norms = subject.columns((BLOCK,), every).norm(dim=1)
        for wanted in (D**0.5 / float(norms.mean()), (D / float(norms.square().mean())) ** 0.5):
            assert any(scale == pytest.approx(wanted, rel=0.02) for scale in scales)


def test_what_comes_to_the_same_coder_is_named_once(coders, lm, text):
    report = diagnose(planted(coders["block"], **at("model.layers.1", "input")), lm, TOKENS, text)
    assert report.candidates[0].mistake == f"{SIDE} or {LAYER}"  # the input of a layer is the output of the one before
    assert report.candidates[0].change == 'site="model.layers.1"'
    figures = [(candidate.ev, candidate.l0) for candidate in report.candidates]
    assert len(set(figures)) == len(figures)


def test_centered_weights_are_told_from_raw_ones(text):
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    sizes = {"n_embd": D, "n_layer": 3, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    model = GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=len(tokenizer))).eval().requires_grad_(False)
    embeddings = model.transformer.wte.weight  # layer norms do not see what is added to all components alike
    embeddings += 3 * torch.randn(len(embeddings), 1)
    lm, site = LanguageModel(model, tokenizer, "gpt2", None, True), Site("transformer.h.1")
    for right, wrong in (("center", "none"), ("none", "center")):
        coder = fit(lm, text, site, normalization=Normalization(right))
        report = diagnose(coder, lm, TOKENS, text)
        assert report.healthy, report.lines()
        report = diagnose(planted(coder, normalization=Normalization(wrong)), lm, TOKENS, text)
        assert not report.healthy
        assert report.candidates[0].mistake == CENTER
        assert report.candidates[0].change == f"normalization {right}"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("block", {**at("model.layers.0"), "pre_bias": "none"}),
        ("block", {**at("model.layers.0"), "selection": ReLU()}),
        ("block", {"pre_bias": "none", "selection": ReLU()}),
        ("block", {**at("model.layers.2"), "normalization": Normalization("scalar", 0.02)}),
        ("scaled", {"normalization": Normalization(), "selection": ReLU()}),
    ],
)
def test_two_mistakes_at_once_are_found(coders, lm, text, name, changes):
    report = diagnose(planted(coders[name], metrics={"advertised": {"l0": K}}, **changes), lm, TOKENS, text)
    assert not report.healthy
    assert " + " in report.candidates[0].mistake, report.lines()
    assert diagnose(report.candidates[0].coder, lm, TOKENS, text).healthy


def test_pairs_are_tried_where_no_single_change_is_enough(coders, lm, text, monkeypatch):
    monkeypatch.setattr("sae.evaluation.doctor.LEAST_EV", 0.8)
    report = diagnose(planted(coders["block"], **at("model.layers.0"), selection=ReLU()), lm, TOKENS, text)
    assert max(candidate.ev for candidate in report.candidates if " + " not in candidate.mistake) < 0.8
    assert report.candidates[0].mistake == f"{LAYER} + {SELECTION}"
    assert report.candidates[0].ev > 0.8


def test_what_improves_a_coder_by_next_to_nothing_is_no_mistake(coders, lm, text):
    off = replace(coders["scaled"].spec.normalization, scale=1.04 * coders["scaled"].spec.normalization.scale)
    report = diagnose(planted(coders["scaled"], normalization=off), lm, TOKENS, text)
    assert max(candidate.ev for candidate in report.candidates) > report.ev
    assert report.healthy, report.lines()


def test_a_coder_of_something_else_is_unwell(lm, text):
    torch.manual_seed(3)
    spec = CoderSpec(D, D, LATENTS, TopK(K), (BLOCK,), (BLOCK,))
    stranger = SparseCoder(spec).requires_grad_(False)
    for parameter in stranger.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    report = diagnose(stranger, lm, TOKENS, text)
    assert not report.healthy
    assert report.verdict.startswith("unwell: EV")
    assert "none of the usual mistakes explains it" in report.verdict


def test_an_l0_far_from_the_advertised_one_is_unwell(coders, lm, text):
    own = diagnose(coders["relu"], lm, TOKENS, text).l0
    for factor, healthy in ((2.5, True), (0.4, True), (0.2, False), (5, False)):
        told = planted(coders["relu"], metrics={"advertised": {"l0": own * factor}})
        report = diagnose(told, lm, TOKENS, text)
        assert report.healthy == healthy, report.lines()
        assert report.advertised_l0 == own * factor


def test_figures_are_over_usual_tokens_and_sinks_are_told_apart(coders, lm, text):
    coder = planted(coders["block"], bos="none", mask=MaskSpec(skip_positions=0))
    rows = rows_of_text(lm, coder.spec, TOKENS, text)
    with loud(lm) as token:
        report = diagnose(coder, lm, TOKENS, text)
        subject = observe(lm, coder.spec, rows)
    left_out = (rows == lm.tokenizer.eos_token_id) | (rows == token)
    left_out[:, 0] = True
    usual, every = subject.columns((BLOCK,)), subject.columns((BLOCK,), every=True)
    assert int((rows == token).sum()) > 50
    assert report.tokens == len(usual) == int((~left_out).sum())
    assert len(every) == rows.numel()
    assert report.ev == pytest.approx(1 - fvu(usual, coder(usual).out), abs=1e-6)
    assert report.ev_with_sinks == pytest.approx(1 - fvu(every, coder(every).out), abs=1e-6)
    assert abs(report.ev - report.ev_with_sinks) > 0.01


def test_rows_begin_with_bos_and_no_document_fills_more_than_one(lm, text):
    spec = CoderSpec(D, D, LATENTS, TopK(K), (BLOCK,), (BLOCK,), context_length=32)
    rows = rows_of_text(lm, spec, 300, text)
    assert rows.shape == (10, 32)
    assert bool((rows[:, 0] == lm.tokenizer.bos_token_id).all())
    ends = (rows.flatten() == lm.tokenizer.eos_token_id).nonzero()[:, 0]
    assert int(ends.diff().max()) <= 34
    assert not bool((rows_of_text(lm, spec.with_(bos="none"), 300, text) == lm.tokenizer.bos_token_id).any())


def test_a_coder_is_diagnosed_by_name_too_and_left_as_it_was(coders, tiny_model, lm, text, monkeypatch):
    coder, before = coders["block"], {name: t.clone() for name, t in coders["block"].state_dict().items()}
    spec = coder.spec
    monkeypatch.setattr("sae.evaluation.doctor.TextConfig", lambda source: TextConfig(text))
    assert sae.diagnose(coder, lm).healthy
    assert coder.spec is spec
    assert all(torch.equal(tensor, before[name]) for name, tensor in coder.state_dict().items())
    named = sae.diagnose(coder, str(tiny_model))  # another model of the same shape
    assert not named.healthy


def test_the_report_is_read_from_its_lines(coders, lm, text):
    report = diagnose(planted(coders["block"], **at("model.layers.0")), lm, TOKENS, text)
    lines = report.lines()
    assert lines[0] == report.verdict
    assert f"L0 {report.l0:.4g} (advertised 4)" in lines[1]
    assert LAYER in lines[3]
    assert all("\n" not in line for line in lines)


def test_transformerlens_names_are_understood(coders, lm, text):
    report = diagnose(planted(coders["block"], **at("blocks.0.hook_resid_post")), lm, TOKENS, text)
    assert report.candidates[0].change == 'site="model.layers.1"'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reads": (), "writes": ()}, "names no site"),
        (at("model.layers.9"), "no module"),
        (at("model.layers.1.mlp.gate_proj"), "to have width 16; in tiny it has 32"),
        ({"reads": (replace(BLOCK, tag=SECOND),), "writes": (replace(BLOCK, tag=SECOND),)}, "two models"),
        ({"selection": GradientTopK(k=K, inference="gradient")}, "set plain"),
    ],
)
def test_what_cannot_be_diagnosed_is_one_line(coders, lm, text, changes, message):
    with pytest.raises(ConfigError, match=message) as raised:
        diagnose(planted(coders["block"], **changes), lm, TOKENS, text)
    assert "\n" not in str(raised.value)


def test_coders_of_several_sites_are_moved_as_a_whole(lm, text):
    torch.manual_seed(0)
    sites = tuple(Site(f"model.layers.{layer}", width=D) for layer in (0, 1))
    for cross_layer, pre_bias in ((False, "decoder"), (True, "none")):
        spec = CoderSpec(2 * D, 2 * D, 64, TopK(K), sites, sites, cross_layer=cross_layer, pre_bias=pre_bias)
        coder = SparseCoder(spec).requires_grad_(False)
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 8)
        found = {candidate.change for candidate in diagnose(coder, lm, TOKENS, text).candidates}
        assert 'site="model.layers.1,model.layers.2"' in found
        assert any(change.startswith("scale=") and change.count(",") == 1 for change in found)
