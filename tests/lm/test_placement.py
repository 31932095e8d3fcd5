"""A model that accelerate has spread, some of it kept on disk, is read as the plain one is, to the bit."""

import os

import accelerate
import pytest
import torch
from rigs.fakes import sampled_rows, tiny_model_folder, tiny_tokenizer
from rigs.tiny_lms import tiny_lm
from transformers import AutoModelForCausalLM

import sae
from interp.evidence.promotes import promoted_tokens
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.evaluation.activations import activations
from sae.evaluation.evaluation import evaluate
from sae.lm import hooks
from sae.lm.calls import probe
from sae.lm.hooks import capture, capture_with_gradients
from sae.lm.intervene import next_logits
from sae.lm.masking import MaskSpec
from sae.lm.models import as_language_model, load_language_model
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
        if request.param == "all on disk" and "on disk alone" in str(error):
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


def absent(model):
    return {name for name, weight in model.named_parameters() if weight.is_meta}


def test_it_is_steered_as_the_plain_one(spread, plain, rows):
    made = coder(plain, "layers.1.mlp")
    found = [sae.steer(lm, made, rows.data[0, :5].tolist(), "1=4, 2:add=2", new_tokens=4) for lm in (spread, plain)]
    assert found[0] == found[1]
    assert absent(spread.model)


def offloaded(how, model, folder):
    """Returns a model that somebody has had spread by accelerate, without a word of it in its config."""
    if how == "cpu_offload":
        return accelerate.cpu_offload(model)
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder)
    if how == "cpu_offload_with_hook":
        return accelerate.cpu_offload_with_hook(model, "cpu")[0]
    whole = ["LlamaDecoderLayer"] if how == "whole layers" else None
    return accelerate.dispatch_model(model, MAPS["some on disk"], offload_dir=folder, preload_module_classes=whole)


@pytest.mark.parametrize(
    "how", ["dispatch_model", "whole layers", "cpu_offload", "disk_offload", "cpu_offload_with_hook"]
)
def test_a_model_that_was_spread_before_it_was_given_is_read_as_it_is(plain, folder, rows, tmp_path, how):
    lm = as_language_model(offloaded(how, AutoModelForCausalLM.from_pretrained(folder), tmp_path))
    assert lm.device.type == "cpu"
    assert lm.fingerprint() == plain.fingerprint()
    before, sites = absent(lm.model), [Site("model.layers.0"), Site("model.layers.1.mlp.down_proj", "input")]
    assert before or how == "cpu_offload_with_hook"
    for _ in range(2):
        found, wanted = (capture(each, sites, rows.data) for each in (lm, plain))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert absent(lm.model) == before
    assert torch.equal(lm.model(rows.data[:2]).logits, plain.model(rows.data[:2]).logits)


@pytest.fixture
def in_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "offloaded"


def on_disk(model):
    """Returns arguments that keep the layers of a model on disk; older versions run none that is there alone."""
    head, base = model.base_model_prefix, model.base_model
    places = {f"{head}.{name}": "disk" for name, _ in base.named_children()}
    places |= {name: "cpu" for name, _ in model.named_children() if name != head}
    (embeddings,) = (name for name, module in model.named_modules() if module is model.get_input_embeddings())
    return {"device_map": {**places, embeddings: "cpu"}}


def saved(kind, folder):
    """Saves a model that is tiny and random; returns the folder, and the arguments that keep its layers on disk."""
    tokenizer = tiny_tokenizer()
    model = tiny_lm(kind, vocab_size=len(tokenizer))
    for each in (model, tokenizer):
        each.save_pretrained(folder)
    return folder, on_disk(model)


def test_a_pass_that_ends_within_a_layer_leaves_none_of_its_weights(tmp_path, in_cache, monkeypatch):
    folder, away = saved("gpt_oss", tmp_path / "model")
    lm = load_language_model(folder, kwargs=away)
    inside, rows, before = (
        [Site("model.layers.1.self_attn.o_proj", "input")],
        torch.arange(3, 12)[None],
        absent(lm.model),
    )
    assert "model.layers.1.self_attn.sinks" in before
    capture(lm, inside, rows)
    assert absent(lm.model) == before
    monkeypatch.setattr(hooks, "put_away", lambda model: None)
    capture(lm, inside, rows)
    assert before - absent(lm.model) == {"model.layers.1.self_attn.sinks"}, "else this test would show nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["gpt2", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "mamba", "qwen3_next", "deepseek_v3", "recurrent_gemma"],
)
def test_a_pass_that_ends_anywhere_is_the_plain_one(tmp_path, in_cache, kind):
    folder, away = saved(kind, tmp_path / "model")
    plain, lm = (load_language_model(folder, kwargs=each) for each in ({}, away))
    assert lm.fingerprint() == plain.fingerprint()
    before, rows = absent(lm.model), torch.randint(3, 200, (2, 9), dtype=torch.int32)
    assert len(before) > 10
    ends = [path for path, call in probe(plain.model).items() if path and call.runs == 1 and call.made is not None]
    assert len(ends) > 10
    for path in ends:
        found, wanted = (capture(each, [Site(path)], rows)[path] for each in (lm, plain))
        assert torch.equal(found, wanted), path
        assert absent(lm.model) == before, path
    whole = [each.model(input_ids=rows, use_cache=False).logits for each in (lm, plain)]
    assert torch.equal(*whole)


def test_what_must_be_written_goes_to_the_cache_for_as_long_as_the_process_lives(tmp_path, in_cache):
    model, away = saved("mixtral", tmp_path / "model")
    lm = load_language_model(model, kwargs=away)
    (folder,) = in_cache.iterdir()
    assert folder.name.startswith(".tmp-")
    assert lm.model.num_parameters() > 0
    assert any(folder.glob("*experts*.safetensors")), "which its files hold one by one"
    (tmp_path / "file").write_text("")
    os.environ["SAE_CACHE"] = str(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"^SAE_CACHE: .* cannot be written to: "):
        load_language_model(model, kwargs=away)


@pytest.mark.slow
def test_the_real_model_is_evaluated_from_disk_as_in_memory(in_cache):
    plain = load_language_model("quickstart")
    lm = load_language_model("quickstart", kwargs=on_disk(plain.model))
    assert lm.fingerprint() == plain.fingerprint()
    rows = sampled_rows(plain, 64, 16)
    (site,) = resolve_sites(plain.model, ["layers.1"], "")
    d = capture(plain, [site], rows.data)[site.name].shape[-1]
    made = SparseCoder(CoderSpec(d, d, 256, TopK(8), (site,), (site,), pre_bias="none", mask=MASK))
    initialize(made, torch.zeros(d), 0)
    found, wanted = (evaluate(made.requires_grad_(False), each, rows, 512, progress=False) for each in (lm, plain))
    assert found == wanted
