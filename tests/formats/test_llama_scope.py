"""Llama Scope, from its config and Linear layers."""

import numpy as np
import pytest
import torch
from rigs.format_files import D_IN, D_SAE, Draw, loads, relu, top, write_json
from safetensors.torch import save_file

import sae
from sae.base.errors import ConfigError, DataError
from sae.coder.normalization import Normalization
from sae.selection.jumprelu import JumpReLU
from sae.selection.relu import ReLU
from sae.selection.topk import TopK

K = 4
TRANSCODER = {"hook_point_in": "blocks.15.ln2.hook_normalized", "hook_point_out": "blocks.15.hook_mlp_out"}


def release(root, change=(), path="fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x", file="final", tensors=()):
    """Writes a coder as it was released; returns its folder and the reference of its map."""
    config = {
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": 8,
        "d_model": D_IN,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.6,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 0.9, "out": 0.9},
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "top_k": K,
    }
    config = {name: value for name, value in (config | dict(change)).items() if value != "left out"}
    draw = Draw()
    stored = {
        "encoder.weight": draw(D_SAE, D_IN),
        "encoder.bias": draw(D_SAE),
        "decoder.weight": draw(D_IN, D_SAE),
        "decoder.bias": draw(D_IN),
    }
    if not config["use_decoder_bias"]:
        stored.pop("decoder.bias")
    if config.get("use_glu_encoder"):
        stored |= {"encoder_glu.weight": draw(D_SAE, D_IN), "encoder_glu.bias": draw(D_SAE)}
    stored = {name: torch.from_numpy(t).bfloat16() for name, t in stored.items()} | dict(tensors)
    folder = root / path
    (folder / "checkpoints").mkdir(parents=True)
    save_file(stored, folder / "checkpoints" / f"{file}.safetensors")
    write_json(folder / "hyperparams.json", config)
    return folder, lambda x: reference(x, {name: t.double().numpy() for name, t in stored.items()}, config)


def reference(x, stored, config):
    """Loads and runs it as the authors do (lm_saes of November 2024): scale, then unit decoders, then activation."""
    means = config["dataset_average_activation_norm"]
    s_in, s_out = (D_IN**0.5 / means[side] for side in ("in", "out"))
    if config["norm_activation"] != "dataset-wise":
        s_in = s_out = 1.0
    W, b = stored["encoder.weight"], stored["encoder.bias"] / s_in
    V, c = stored["decoder.weight"] * s_in / s_out, stored.get("decoder.bias", np.zeros(D_IN)) / s_out
    if config["sparsity_include_decoder_norm"]:
        norm = np.linalg.norm(V, axis=0)
        V, W, b = V / norm, W * norm[:, None], b * norm
    size = np.linalg.norm(x, axis=1, keepdims=True) / D_IN**0.5 if config["norm_activation"] == "token-wise" else 1.0
    y = x / size - (c if config["apply_decoder_bias_to_pre_encoder"] and config["use_decoder_bias"] else 0)
    h = y @ W.T + b
    if config["use_glu_encoder"]:
        h = h / (1 + np.exp(-(y @ stored["encoder_glu.weight"].T + stored["encoder_glu.bias"])))
    threshold = config.get("jump_relu_threshold") or 0
    if config["act_fn"] == "topk" and threshold == 0:
        kept, margin = top(h, config["top_k"])
        acts = relu(kept)
    else:
        threshold = 0 if config["act_fn"] == "relu" else threshold
        acts, margin = np.where(h > threshold, h, 0), np.abs(h - threshold).min(1)
    return acts, (acts @ V.T + c) * size, margin


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
