"""Llamascopium, from its configs and tensors: every sae_type, and the Linear layers of before."""

import json

import pytest
import torch
from rigs.format_files import D_IN, D_SAE, loads, write_json
from rigs.released.openmoss import CLT, CROSSCODER, IN, NORM, OUT, PLAIN, TRANSCODER, H, K, release

import sae
from sae.base.errors import ConfigError, DataError
from sae.coder.normalization import Normalization
from sae.selection.mutual_choice import MutualChoice
from sae.selection.topk import TopK


@pytest.mark.parametrize("kind", [PLAIN, TRANSCODER, CLT], ids=["sae", "transcoder", "clt"])
@pytest.mark.parametrize("included", [True, False])
@pytest.mark.parametrize("act", ["relu", "topk", "jumprelu"])
def test_latents_are_the_librarys_own(tmp_path, kind, included, act):
    folder, wanted = release(tmp_path, kind, act_fn=act, sparsity_include_decoder_norm=included)
    spec = loads(folder, wanted).spec
    assert spec.normalization.kind == "scalar"
    assert spec.select_by_decoder_norm == (included and act == "topk")


@pytest.mark.parametrize(
    "change",
    [
        {"norm_activation": "inference"},
        {"norm_activation": "token-wise"},
        {"use_decoder_bias": False},
        {"use_glu_encoder": True},
        {"use_glu_encoder": True, "act_fn": "topk"},
        {"sae_type": "matryoshka_sae", "matryoshka_widths": [8, 20]},
        {"sae_type": "left out"},
        {"dtype": torch.float16},
    ],
)
def test_a_single_coder_is_read_as_its_config_says(tmp_path, change):
    loads(*release(tmp_path, **change))


def test_the_case_of_an_activation_does_not_matter(tmp_path):
    folder, wanted = release(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"act_fn": "JumpReLU"})
    loads(folder, wanted)


@pytest.mark.parametrize("change", [{}, {"apply_decoder_bias_to_pre_encoder": True}, {"use_glu_encoder": True}])
@pytest.mark.parametrize("kind", [PLAIN, TRANSCODER], ids=["sae", "transcoder"])
def test_the_linear_layers_of_before_are_read_too(tmp_path, kind, change):
    folder, wanted = release(tmp_path, kind, linear=True, dtype=torch.bfloat16, **change)
    loads(folder, wanted)


def test_the_scale_of_a_release_without_its_norm_is_asked_for(tmp_path):
    path, hook = "fnlp/Llama-Scope-R1-Distill/another-mix/L3R", PLAIN["hook_point_in"]
    norm = torch.tensor(0.3)
    _, wanted = release(tmp_path / "whole", path=path, linear=True)
    folder, _ = release(tmp_path, path=path, linear=True, tensors={NORM + hook: None})
    with pytest.raises(ConfigError, match=r"^scale: .*sae_weights\.safetensors does not say it \(.*E\|x\|"):
        sae.load(folder)
    scale = sae.load(tmp_path / "whole" / path).spec.normalization.scale
    spec = loads(folder, wanted, scale=scale).spec
    assert spec.reads[0].model == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    folder, _ = release(tmp_path / "other", path=path, linear=True, tensors={NORM + hook: norm})
    assert sae.load(folder).spec.normalization.scale == pytest.approx(D_IN**0.5 / 0.3)
    with pytest.raises(ConfigError, match=r"^scale: .* is complete without it"):
        sae.load(folder, scale=scale)


def test_norms_without_a_value_are_ignored_where_they_are_not_looked_at(tmp_path):
    broken = {NORM + PLAIN["hook_point_in"]: torch.tensor(torch.nan)}
    folder, wanted = release(tmp_path, norm_activation="inference", tensors=broken)
    assert loads(folder, wanted).spec.normalization == Normalization()
    folder, _ = release(tmp_path, path="y", tensors=broken)
    with pytest.raises(DataError, match=r"activation_norm\.blocks\.3\.hook_resid_post holds NaN or Inf"):
        sae.load(folder)


def test_a_latent_whose_decoder_is_zero_never_fires(tmp_path):
    folder, _ = release(tmp_path, tensors={"W_D": torch.zeros(D_SAE, D_IN)})
    assert not sae.load(folder).encode(torch.randn(10, D_IN)).ids.numel()


@pytest.mark.parametrize(
    ("act", "even", "norm"),
    [
        ("relu", False, "dataset-wise"),
        ("relu", False, "token-wise"),
        ("relu", False, "inference"),
        ("jumprelu", True, "dataset-wise"),
        ("topk", True, "dataset-wise"),
    ],
)
def test_a_crosscoder_sums_its_hooks_and_writes_them(tmp_path, act, even, norm):
    folder, wanted = release(tmp_path, CROSSCODER, act_fn=act, even=even, norm_activation=norm)
    spec = loads(folder, wanted).spec
    assert (spec.d_in, spec.d_out, spec.d_sae) == (H * D_IN, H * D_IN, D_SAE)
    assert [site.hook for site in spec.reads] == CROSSCODER["hook_points"]
    assert spec.writes == spec.reads


@pytest.mark.parametrize("act", ["jumprelu", "topk", "batchtopk"])
def test_a_crosscoder_whose_latents_fire_hook_by_hook_is_refused(tmp_path, act):
    with pytest.raises(ConfigError, match=rf"act_fn: .* is a crosscoder with '{act}', .* has one value for all"):
        sae.load(release(tmp_path, CROSSCODER, act_fn=act)[0])


def test_a_clt_is_one_block_of_latents_for_each_layer(tmp_path):
    folder, wanted = release(tmp_path, CLT)
    spec = loads(folder, wanted).spec
    assert (spec.cross_layer, spec.budget, spec.d_sae) == (True, "block", H * D_SAE)
    assert [site.hook for site in (*spec.reads, *spec.writes)] == [*IN, *OUT]


def test_a_budget_of_all_layers_is_shared(tmp_path):
    folder, wanted = release(tmp_path, CLT, act_fn="layertopk", top_k=2 * H)
    spec = loads(folder, wanted).spec
    assert (spec.selection, spec.budget) == (TopK(2), "shared")
    with pytest.raises(ConfigError, match=r"top_k: .* keeps 4 of all layers together, which 3 do not share equally"):
        sae.load(release(tmp_path, CLT, "y", act_fn="layertopk", top_k=4)[0])


@pytest.mark.parametrize(("kind", "act"), [(PLAIN, "batchtopk"), (CLT, "batchtopk"), (CLT, "batchlayertopk")])
def test_batchtopk_says_that_it_is_not_calibrated(tmp_path, caplog, kind, act):
    folder, wanted = release(tmp_path, kind, act_fn=act, top_k=2 * H)
    spec = loads(folder, wanted).spec  # the library's own, of one token at a time
    assert spec.selection == MutualChoice(2 if "layer" in act else 2 * H)
    assert spec.calibration == ()
    assert f"act_fn {act} has no threshold" in caplog.text


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        (PLAIN, {"sae_type": "lorsa"}, ConfigError, "sae_type: .* is lorsa, a sparse attention layer"),
        (PLAIN, {"sae_type": "molt"}, ConfigError, "sae_type: .* is molt, a mixture of linear transforms"),
        (PLAIN, {"sae_type": "mixcoder"}, DataError, "sae_type is 'mixcoder'; known are"),
        (PLAIN, {"act_fn": "gelu"}, DataError, "act_fn is 'gelu'; known are relu, jumprelu, topk, batchtopk"),
        (PLAIN, {"act_fn": "layertopk"}, DataError, "act_fn is 'layertopk'; known are relu, jumprelu, topk, batchtopk"),
        (PLAIN, {"act_fn": "topk", "top_k": "left out"}, DataError, "top_k is None, expected a whole number"),
        (PLAIN, {"norm_activation": "batch-wise"}, ConfigError, "norm_activation: .* rest of the batch"),
        (PLAIN, {"norm_activation": "layer"}, DataError, "norm_activation is 'layer'; known are dataset-wise"),
        (TRANSCODER, {"norm_activation": "token-wise"}, ConfigError, "norm_activation: .* is 'token-wise', and its"),
        (CLT, {"norm_activation": "token-wise"}, ConfigError, "norm_activation: .* is 'token-wise', and its"),
        (PLAIN, {"sparsity_include_decoder_norm": "left out"}, DataError, "sparsity_include_decoder_norm is None"),
        (CROSSCODER, {"sparsity_include_decoder_norm": False}, ConfigError, "sparsity_include_decoder_norm: false"),
        (PLAIN, {"hook_point_in": 3}, DataError, "hook_point_in is 3, expected the name of a hook"),
        (PLAIN, {"hook_point_out": ["a", "b"]}, DataError, r"hook_point_out is \['a', 'b'\], expected the name"),
        (CLT, {"hook_points_out": []}, DataError, r"hook_points_out is \[\], expected a list of hooks"),
        (PLAIN, {"apply_decoder_bias_to_pre_encoder": True}, ConfigError, "apply_decoder_bias_to_pre_encoder: true"),
        (PLAIN, {"d_model": D_IN + 1}, DataError, r"tensor W_E has shape \(6, 20\), expected \(7, 20\)"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, kind, change, error, message):
    folder, _ = release(tmp_path, kind)
    config = {name: v for name, v in (kind | BASE | change).items() if v != "left out"}
    write_json(folder / "config.json", config)
    with pytest.raises(error, match=message):
        sae.load(folder)


BASE = {
    "d_model": D_IN,
    "use_decoder_bias": True,
    "act_fn": "relu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": K,
}


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        (PLAIN, {"activation_function.log_jumprelu_threshold": None}, "log_jumprelu_threshold is missing"),
        (PLAIN, {"W_Q": torch.ones(2)}, "tensor W_Q is not part of this format"),
        (PLAIN, {"W_E_glu": torch.ones(D_IN, D_SAE)}, "tensor W_E_glu is not part of this format"),
        (TRANSCODER, {NORM + OUT[0]: None}, rf"tensor {NORM}{OUT[0]} is missing".replace(".", r"\.")),
        (CLT, {"W_D.1": torch.ones(3, D_SAE, D_IN)}, r"tensor W_D\.1 has shape \(3, 20, 6\), expected \(2, 20, 6\)"),
        (CLT, {"b_D.2": None}, r"tensor b_D\.2 is missing"),
    ],
)
def test_a_tensor_too_many_or_too_few_is_named(tmp_path, kind, tensors, message):
    with pytest.raises(DataError, match=message):
        sae.load(release(tmp_path, kind, tensors=tensors)[0])
