"""Gemma Scope 2: coders of one layer, and those of several layers that lie in one file a layer."""

import math

import numpy as np
import pytest
from rigs.format_files import D_IN, D_OUT, D_SAE, agrees, loads
from rigs.released.gemma_scope_2 import LAYERS, PLACES, REPOSITORY, config_of, write, write_layers
from safetensors.numpy import load_file, save_file
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

import sae
from sae.base.errors import ConfigError, DataError
from sae.lm.sites import find_module, resolve_sites
from sae.loading.hub import load_all

SITES = {
    "resid_post": ("blocks.17.hook_resid_post", "blocks.17.hook_resid_post"),
    "mlp_out": ("blocks.17.hook_mlp_out", "blocks.17.hook_mlp_out"),
    "attn_out": ("blocks.17.attn.hook_z", "blocks.17.attn.hook_z"),
    "transcoder": ("layers.17.pre_feedforward_layernorm", "blocks.17.hook_mlp_out"),
}


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("kind", SITES)
def test_sites_come_from_the_config_or_else_from_the_path(tmp_path, kind, described):
    root = tmp_path / ("copied" if described else REPOSITORY)
    path = "elsewhere" if described else f"{kind}_all/layer_17_width_16k_l0_big"
    d_out = D_OUT if kind == "transcoder" else D_IN
    folder, wanted = write(root, path, config_of(17, kind) if described else None, d_out=d_out)
    spec = loads(folder, wanted).spec
    assert (spec.reads[0].hook, spec.writes[0].hook) == SITES[kind]
    assert spec.is_autoencoder == (kind != "transcoder")
    assert spec.reads[0].model == spec.writes[0].model == "google/gemma-3-4b-pt"
    assert spec.metrics["advertised"] == ({"l0": 150.0} if described else {"l0_range": [90, 150]})
    assert spec.context_length == 1024


@pytest.mark.parametrize("described", [True, False])
def test_the_affine_skip_is_applied_from_the_right(tmp_path, described):
    path = "transcoder/layer_17_width_16k_l0_small_affine"
    config = config_of(17, "transcoder", affine_connection=True) if described else None
    folder, wanted = write(tmp_path / REPOSITORY, path, config, d_out=D_OUT, affine=True)
    coder = loads(folder, wanted)
    assert (coder.spec.skip, coder.W_skip.shape) == (True, (D_OUT, D_IN))


@pytest.mark.parametrize(
    ("repository", "said", "model"),
    [
        ("google/gemma-scope-2-270m-pt", None, "google/gemma-3-270m"),
        ("google/gemma-scope-2-270m-it", None, "google/gemma-3-270m-it"),
        ("google/gemma-scope-2-12b-it", None, "google/gemma-3-12b-it"),
        ("x/y", "google/gemma-3-270m-pt", "google/gemma-3-270m"),
        ("x/y", "gemma-v3-1b-it", "google/gemma-3-1b-it"),
    ],
)
def test_models_go_by_their_names_on_the_hub(tmp_path, repository, said, model):
    config = config_of(17, "resid_post", model_name=said) if said else None
    folder, _ = write(tmp_path / repository, "resid_post/layer_17_width_1m_l0_medium_seed_1", config)
    assert sae.load(folder).spec.reads[0].model == model
    assert sae.load(folder, model="mine").spec.reads[0].model == "mine"


def test_another_hook_point_is_taken_as_it_stands(tmp_path):
    config = config_of(4, "resid_post", hf_hook_point_in="model.layers.4.mlp.gate_proj.input")
    folder, _ = write(tmp_path, "x", config)
    assert sae.load(folder).spec.reads[0].name == "layers.4.mlp.gate_proj:input"


def test_without_config_and_path_the_sites_stay_empty(tmp_path):
    folder, wanted = write(tmp_path, "x", d_out=D_OUT)
    assert loads(folder, wanted).spec.reads == ()


def test_a_single_layers_site_may_be_said(tmp_path):
    folder, wanted = write(tmp_path, "x", d_out=D_OUT)
    spec = loads(folder, wanted, site="model.layers.3.mlp:input -> blocks.3.hook_mlp_out", model="m").spec
    assert [(s.name, s.model) for s in spec.reads] == [("model.layers.3.mlp:input", "m")]
    assert [(s.name, s.model) for s in spec.writes] == [("blocks.3.hook_mlp_out", "m")]
    folder, wanted = write(tmp_path, "y")
    assert loads(folder, wanted, site="model.layers.3").spec.is_autoencoder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "architecture is 'topk'; known are jump_relu"),
        ({"hf_hook_point_in": "model.norm.output"}, "hf_hook_point_in is 'model.norm.output', expected"),
        ({"hf_hook_point_out": "model.layers.{1,2}.output"}, "which are 2 layers; the weights are of 1"),
        ({"hf_hook_point_out": "model.layers.1.self_attn"}, "hf_hook_point_out is .*, expected"),
        ({"affine_connection": True}, "affine_connection is True, but the tensor affine_skip_connection is missing"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(tmp_path, changes, message):
    folder, _ = write(tmp_path, "x", config_of(17, "resid_post", **changes))
    with pytest.raises(DataError, match=message):
        sae.load(folder)


def test_a_skip_that_the_config_denies_is_refused(tmp_path):
    folder, _ = write(tmp_path, "x", config_of(17, "transcoder"), affine=True)
    with pytest.raises(DataError, match="affine_connection is False, but the tensor affine_skip_connection is there"):
        sae.load(folder)


@pytest.mark.parametrize("change", ["more", "less", "shape"])
def test_tensors_that_do_not_fit_are_refused(tmp_path, change):
    folder, _ = write(tmp_path, "x")
    tensors = load_file(folder / "params.safetensors")
    if change == "more":
        tensors["log_scale"] = tensors["b_enc"]
    elif change == "less":
        tensors["threshold"] = tensors["threshold"][1:]
    else:
        tensors["w_enc"] = np.ascontiguousarray(tensors["w_enc"].T)
    save_file(tensors, folder / "params.safetensors")
    named = {"more": "log_scale", "less": "threshold", "shape": "w_enc"}[change]
    with pytest.raises(DataError, match=f"tensor {named} "):
        sae.load(folder)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("described", [True, False])
def test_a_cross_layer_transcoder_is_one_coder_of_all_layers(tmp_path, described, affine):
    path = "clt/width_262k_l0_medium" + ("_affine" if affine else "")
    config = config_of("{all}", "transcoder", type="clt", affine_connection=affine) if described else None
    folder, wanted = write_layers(tmp_path / "google/gemma-scope-2-1b-pt", path, config, d_out=D_OUT, affine=affine)
    coder = loads(folder, wanted)
    spec = coder.spec
    assert (spec.cross_layer, spec.skip, spec.d_sae) == (True, affine, LAYERS * D_SAE)
    assert [site.hook for site in spec.reads] == [f"layers.{i}.pre_feedforward_layernorm" for i in range(LAYERS)]
    assert [site.hook for site in spec.writes] == [f"blocks.{i}.hook_mlp_out" for i in range(LAYERS)]
    assert {(r.width, w.width) for r, w in zip(spec.reads, spec.writes, strict=True)} == {(D_IN, D_OUT)}
    assert len(coder.W_dec) == D_SAE * math.comb(LAYERS + 1, 2)
    assert list(load_all(folder)) == ["width_262k_l0_medium" + ("_affine" if affine else "")]
    agrees(sae.load(folder, lazy=True), wanted)


@pytest.mark.parametrize("described", [True, False])
def test_a_crosscoder_writes_the_layers_that_it_reads(tmp_path, described):
    config = config_of("{7,13,17}", "resid_post", type="crosscoder") if described else None
    path = "copied" if described else "crosscoder/layer_7_13_17_width_65k_l0_big"
    folder, wanted = write_layers(tmp_path / "google/gemma-scope-2-1b-it", path, config)
    spec = loads(folder, wanted).spec
    assert [site.hook for site in spec.reads] == [f"blocks.{i}.hook_resid_post" for i in (7, 13, 17)]
    assert (spec.is_autoencoder, spec.cross_layer, spec.pre_bias) == (True, True, "none")


def test_a_latent_that_writes_to_an_earlier_layer_is_refused(tmp_path):
    folder, _ = write_layers(tmp_path, "clt/width_262k_l0_big")
    path = folder / "params_layer_2.safetensors"
    tensors = load_file(path)
    tensors["w_dec"][3, 1, 2] = 1e-6
    save_file(tensors, path)
    with pytest.raises(DataError, match=r"params_layer_2\.safetensors: tensor w_dec writes to layers before its own"):
        sae.load(folder)


@pytest.mark.parametrize("layer", [0, 2])
def test_all_layers_have_a_skip_or_none(tmp_path, layer):
    config = {k: v for k, v in config_of("{all}", "transcoder").items() if k != "affine_connection"}
    folder, _ = write_layers(tmp_path, "x", config, affine=True)
    path = folder / f"params_layer_{layer}.safetensors"
    tensors = load_file(path)
    del tensors["affine_skip_connection"]
    save_file(tensors, path)
    wrong = "False, but the tensor affine_skip_connection is there" if layer == 0 else "True, but .* is missing"
    with pytest.raises(DataError, match=f"affine_connection is {wrong}"):
        sae.load(folder)


def test_no_layer_may_be_missing(tmp_path):
    folder, _ = write_layers(tmp_path, "clt/width_262k_l0_big")
    (folder / "params_layer_2.safetensors").unlink()
    with pytest.raises(DataError, match="w_dec writes to 3 layers, but there are 2 files"):
        sae.load(folder)
    (folder / "params_layer_1.safetensors").rename(folder / "params_layer_2.safetensors")
    save_file(load_file(folder / "params_layer_2.safetensors"), folder / "params_layer_3.safetensors")
    with pytest.raises(DataError, match=r"params_layer_1\.safetensors is missing"):
        sae.load(folder)


@pytest.mark.parametrize("layers", ["{1,2}", "3"])
def test_as_many_layers_are_named_as_there_are(tmp_path, layers):
    folder, _ = write_layers(tmp_path, "x", config_of(layers, "resid_post"))
    with pytest.raises(DataError, match=r"hf_hook_point_in is .* the weights are of 3"):
        sae.load(folder)


def test_the_layers_of_several_are_not_guessed(tmp_path):
    folder, _ = write_layers(tmp_path, "x")
    with pytest.raises(ConfigError, match=r"^path: .* does not say which layers it reads"):
        sae.load(folder)


def text_config():
    return Gemma3TextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=6,
    )


def multimodal():
    vision = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    config = Gemma3Config(text_config=text_config().to_dict(), vision_config={**vision, "image_size": 28})
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize(
    ("build", "prefix"),
    [(lambda: Gemma3ForCausalLM(text_config()), "model"), (multimodal, "model.language_model")],
    ids=["text", "images"],
)
def test_the_sites_are_found_with_and_without_images(tmp_path, build, prefix, kind):
    folder, _ = write(tmp_path, f"{kind}/layer_1_width_16k_l0_big")
    spec, model = sae.load(folder).spec, build()
    for site, place in zip((spec.reads[0], spec.writes[0]), PLACES[kind], strict=True):
        path, _, side = f"{prefix}.layers.1.{place}".rpartition(".")
        found = resolve_sites(model, [site.name])
        assert [(s.hook, s.side) for s in found] == [(path, side)]
        assert find_module(model, site) == (model.get_submodule(path), side)
