"""Llama Scope, from its config and Linear layers."""

import pytest
import torch
from rigs.format_files import D_IN, D_SAE, loads
from rigs.released.llama_scope import TRANSCODER, K, release

import sae
from sae.base.errors import ConfigError, DataError
from sae.coder.normalization import Normalization
from sae.selection.jumprelu import JumpReLU
from sae.selection.relu import ReLU
from sae.selection.topk import TopK


@pytest.mark.parametrize(
    ("change", "selection"),
    [
        ({}, JumpReLU()),
        ({"sparsity_include_decoder_norm": False}, JumpReLU()),
        ({"act_fn": "topk"}, JumpReLU()),
        ({"act_fn": "topk", "jump_relu_threshold": 0.0}, TopK(K)),
        ({"act_fn": "topk", "jump_relu_threshold": "left out", "sparsity_include_decoder_norm": False}, TopK(K)),
        ({"act_fn": "relu"}, ReLU()),
        ({"use_decoder_bias": False}, JumpReLU()),
        ({"apply_decoder_bias_to_pre_encoder": True}, JumpReLU()),
        ({"apply_decoder_bias_to_pre_encoder": True, "use_decoder_bias": False}, JumpReLU()),
        ({"norm_activation": "none"}, JumpReLU()),
        ({"norm_activation": "inference", "use_glu_encoder": True}, JumpReLU()),
        ({"norm_activation": "token-wise", "apply_decoder_bias_to_pre_encoder": True}, JumpReLU()),
        (TRANSCODER | {"dataset_average_activation_norm": {"in": 2.4, "out": 0.7}}, JumpReLU()),
    ],
)
def test_latents_are_those_of_the_authors_final_state(tmp_path, change, selection):
    folder, wanted = release(tmp_path, change)
    assert loads(folder, wanted).spec.selection == selection


def test_nothing_is_left_to_normalize_and_decoders_have_norm_one(tmp_path):
    folder, wanted = release(tmp_path)
    coder = loads(folder / "checkpoints" / "final.safetensors", wanted)
    assert coder.spec.normalization == Normalization()
    assert torch.allclose(coder.decoder_norms(), torch.ones(D_SAE))
    assert torch.equal(coder.get_parameter("threshold"), torch.full((D_SAE,), 0.6))


def test_sites_are_those_of_the_config_and_the_model_that_of_the_folder(tmp_path):
    folder, wanted = release(tmp_path, path="Llama3_1-8B-Base-L15R-8x", file="pruned")
    spec = loads(folder, wanted).spec
    assert spec.reads == spec.writes
    assert (spec.reads[0].hook, spec.reads[0].model) == ("blocks.15.hook_resid_post", "meta-llama/Llama-3.1-8B")
    folder, wanted = release(tmp_path, TRANSCODER, path="elsewhere")
    spec = loads(folder, wanted, model="m").spec
    hooks = [(site.hook, site.model) for site in (*spec.reads, *spec.writes)]
    assert hooks == [("blocks.15.ln2.hook_normalized", "m"), ("blocks.15.hook_mlp_out", "m")]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"act_fn": "gelu"}, DataError, "act_fn is 'gelu'; known are relu, topk, jumprelu"),
        ({"jump_relu_threshold": "left out"}, DataError, "jump_relu_threshold is None, expected a number"),
        ({"jump_relu_threshold": -0.1}, DataError, r"jump_relu_threshold is -0\.1, expected a number that is not"),
        ({"act_fn": "topk", "jump_relu_threshold": 0, "top_k": None}, DataError, "top_k is None"),
        ({"norm_activation": "batch-wise"}, ConfigError, "norm_activation: .* rest of the batch"),
        ({"norm_activation": "layer"}, DataError, "norm_activation is 'layer'; known are"),
        (TRANSCODER | {"norm_activation": "token-wise"}, ConfigError, "norm_activation: .* is 'token-wise'"),
        ({"dataset_average_activation_norm": "left out"}, DataError, "dataset_average_activation_norm is None"),
        ({"dataset_average_activation_norm": {"in": 2.0}}, DataError, "positive numbers in and out"),
        ({"sparsity_include_decoder_norm": "left out"}, DataError, "sparsity_include_decoder_norm is None"),
        ({"use_glu_encoder": True}, ConfigError, "use_glu_encoder: true, but .* trained on inputs scaled by"),
        (
            {"apply_decoder_bias_to_pre_encoder": True, "dataset_average_activation_norm": {"in": 1, "out": 2}},
            ConfigError,
            "apply_decoder_bias_to_pre_encoder: true, but .* not certain",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        sae.load(release(tmp_path, change)[0])


def test_what_the_config_does_not_speak_of_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"tensor encoder_glu\.weight is not part of this format"):
        sae.load(release(tmp_path, tensors={"encoder_glu.weight": torch.ones(D_SAE, D_IN)})[0])
    with pytest.raises(DataError, match=r"tensor encoder\.bias has shape"):
        sae.load(release(tmp_path, path="x", tensors={"encoder.bias": torch.ones(D_SAE, 1)})[0])
