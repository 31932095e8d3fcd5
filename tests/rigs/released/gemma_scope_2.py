"""Gemma Scope 2, as it was released: coders of one layer, and of several."""

import numpy as np
from rigs.format_files import D_IN, D_SAE, Draw, relu, write_json
from safetensors.numpy import save_file

REPOSITORY = "google/gemma-scope-2-4b-pt"
PLACES = {
    "resid_post": ("output", "output"),
    "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
LAYERS = 3


def config_of(layers, kind, **more):
    points = {
        name: f"model.layers.{layers}.{place}"
        for name, place in zip(("hf_hook_point_in", "hf_hook_point_out"), PLACES[kind], strict=True)
    }
    common = {"width": D_SAE, "model_name": "google/gemma-3-4b-pt", "architecture": "jump_relu", "l0": 150}
    return {**common, "affine_connection": False, "type": "sae", **points, **more}


def write(root, path, config=None, d_in=D_IN, d_out=D_IN, affine=False):
    draw, folder = Draw(), root / path
    folder.mkdir(parents=True)
    tensors = {
        "w_enc": draw(d_in, D_SAE),
        "w_dec": draw(D_SAE, d_out),
        "b_enc": draw(D_SAE),
        "b_dec": draw(d_out),
        "threshold": draw.positive(D_SAE),
    }
    tensors |= {"affine_skip_connection": draw(d_in, d_out)} if affine else {}
    save_file(tensors, folder / "params.safetensors")
    if config is not None:
        write_json(folder / "config.json", config)
    return folder, lambda x: reference(x, {n: t.astype(np.float64) for n, t in tensors.items()})


def reference(x, p):
    h = x @ p["w_enc"] + p["b_enc"]
    acts = relu(h) * (h > p["threshold"])
    out = acts @ p["w_dec"] + p["b_dec"]
    if "affine_skip_connection" in p:
        out = out + x @ p["affine_skip_connection"]
    return acts, out, np.abs(h - p["threshold"]).min(1)


def write_layers(root, path, config=None, d_out=D_IN, affine=False):
    draw, folder, layers = Draw(), root / path, []
    folder.mkdir(parents=True)
    for i in range(LAYERS):
        w_dec = draw(D_SAE, LAYERS, d_out)
        w_dec[:, :i] = 0
        layer = {
            "w_enc": draw(D_IN, D_SAE),
            "w_dec": w_dec,
            "b_enc": draw(D_SAE),
            "b_dec": draw(d_out),
            "threshold": draw.positive(D_SAE),
        }
        layer |= {"affine_skip_connection": draw(D_IN, d_out)} if affine else {}
        save_file(layer, folder / f"params_layer_{i}.safetensors")
        layers.append({n: t.astype(np.float64) for n, t in layer.items()})
    if config is not None:
        write_json(folder / "config.json", config)
    return folder, lambda x: several(x, layers)


def several(x, layers):
    """The release's own map: every layer's latents decode to every layer, most of that with zeros."""
    p = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    x = x.reshape(len(x), LAYERS, -1)
    h = np.einsum("tld,ldm->tlm", x, p["w_enc"]) + p["b_enc"]
    acts = relu(h) * (h > p["threshold"])
    out = np.einsum("tlm,lmkd->tkd", acts, p["w_dec"]) + p["b_dec"]
    if "affine_skip_connection" in p:
        out = out + np.einsum("tld,lde->tle", x, p["affine_skip_connection"])
    return acts.reshape(len(x), -1), out.reshape(len(x), -1), np.abs(h - p["threshold"]).min((1, 2))
