"""Llama Scope, as it was released."""

import numpy as np
import torch
from rigs.format_files import D_IN, D_SAE, Draw, relu, top, write_json
from safetensors.torch import save_file

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
