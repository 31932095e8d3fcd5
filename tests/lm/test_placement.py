"""A model that accelerate has spread, some of it kept on disk, is read as the plain one is, to the bit."""

import pytest
import torch
from rigs.fakes import sampled_rows, tiny_model_folder

from interp.evidence.promotes import promoted_tokens
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.evaluation.activations import activations
from sae.evaluation.evaluation import evaluate
from sae.lm.hooks import capture, capture_with_gradients
from sae.lm.intervene import next_logits
from sae.lm.masking import MaskSpec
from sae.lm.models import load_language_model
from sae.lm.norms import norm_of
from sae.lm.placement import named_weights, present, without_hooks
from sae.lm.site import Site
from sae.lm.sites import resolve_sites
from sae.selection.topk import TopK

D = 16
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
MAPS = {
    "some on disk": {part: "disk" if part in ("model.layers.1", "model.norm") else "cpu" for part in PARTS},
    "all on disk": dict.fromkeys(PARTS, "disk"),
}
MASK = MaskSpec((0, 1, 2), 1)
NAMES = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_in", "blocks.1.ln2.hook_normalized", "blocks.1.attn.hook_z"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param, initializer_range=0.5)


@pytest.fixture(scope="module")
def plain(folder):
    return load_language_model(folder)


@pytest.fixture(scope="module", params=MAPS)
def spread(folder, request, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    try:
        lm = load_language_model(folder, kwargs={"device_map": MAPS[request.param], "offload_folder": away})
    except ConfigError as error:
        if request.param == "all on disk" and "meta tensors" in str(error):
            pytest.skip("this version of transformers runs no model that is on disk alone")
        raise
    assert any(weight.is_meta for weight in lm.model.parameters())
    return lm


@pytest.fixture(scope="module")
def rows(plain):
    return sampled_rows(plain, 12, 8)


def coder(lm, site):
    (read,) = resolve_sites(lm.model, [site], lm.name)
    spec = CoderSpec(D, D, 32, TopK(4), (read,), (read,), pre_bias="none", mask=MASK)
    made = SparseCoder(spec)
    initialize(made, torch.zeros(D), 0)
    return made.requires_grad_(False)


def test_it_is_the_same_model(spread, plain):
    assert spread.device == plain.device
    assert (spread.is_causal, spread.positions) == (plain.is_causal, plain.positions)
    assert spread.fingerprint() == plain.fingerprint()
    weights = dict(named_weights(spread.model))
    assert {name: x.shape for name, x in weights.items()} == {n: x.shape for n, x in named_weights(plain.model)}


def test_places_have_the_same_names_and_activations(spread, plain, rows):
    sites = [resolve_sites(lm.model, NAMES, "") for lm in (spread, plain)]
    assert sites[0] == sites[1]
    found, wanted = (capture(lm, sites[0], rows.data) for lm in (spread, plain))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(weight.is_meta for weight in spread.model.model.layers[1].parameters()), "they are put away again"


def test_gradients_and_predictions_are_the_same(spread, plain, rows):
    sites = [Site("model.layers.0"), Site("model.layers.1.mlp")]
    found, wanted = (capture_with_gradients(lm, sites, rows.data, MASK) for lm in (spread, plain))
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert all(x.any() for x in theirs.values())
    lengths = torch.full((len(rows.data),), 6)
    assert torch.equal(next_logits(spread, rows.data, lengths), next_logits(plain, rows.data, lengths))


@pytest.mark.parametrize("site", ["layers.0", "layers.1.mlp"])
def test_evaluation_and_activations_are_the_same(spread, plain, rows, site):
    made = coder(plain, site)
    found, wanted = (evaluate(made, lm, rows, 96, progress=False) for lm in (spread, plain))
    assert found == wanted
    assert activations(spread, made, "abc").top() == activations(plain, made, "abc").top()
    assert promoted_tokens(spread, made, [1, 2]) == promoted_tokens(plain, made, [1, 2])


def test_a_copy_of_a_module_has_its_weights_and_no_hooks(spread, plain):
    norm, same = spread.model.model.norm, plain.model.model.norm
    assert norm_of(norm, D) == norm_of(same, D)
    made = without_hooks(norm)
    assert torch.equal(made.weight, same.weight)
    x = torch.randn(3, D)
    assert torch.equal(made(x), same(x))
    with present(norm):
        assert torch.equal(norm.weight, same.weight)
    assert norm.weight.is_meta
