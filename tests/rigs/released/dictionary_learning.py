"""dictionary_learning's classes, as its trainers save them."""

import numpy as np
import torch
from rigs.format_files import D_IN, D_SAE, Draw, relu, top, write_json

K, CUT = 3, 0.5
OPTIMIZER = {  # as Adam saves it
    "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}},
    "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "params": [0]}],
}
LINEAR = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE)}
MATRICES = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
GATED = {"gate_bias": (D_SAE,), "mag_bias": (D_SAE,), "r_mag": (D_SAE,), "decoder_bias": (D_IN,)}
SHAPES = {
    "AutoEncoder": {**LINEAR, "bias": (D_IN,)},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": (D_IN,)},
    "AutoEncoderTopK": {**LINEAR, "b_dec": (D_IN,)},
    "BatchTopKSAE": {**LINEAR, "b_dec": (D_IN,)},
    "MatryoshkaBatchTopKSAE": MATRICES,
    "JumpReluAutoEncoder": MATRICES,
    "GatedAutoEncoder": {"encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE), **GATED},
}
SHAPES["MatroyshkaBatchTopKSAE"] = SHAPES["MatryoshkaBatchTopKSAE"]


def state(kind, cut=CUT, seed=0):
    draw = Draw(seed)
    tensors = {name: torch.from_numpy(draw(*shape)) for name, shape in SHAPES[kind].items()}
    if "TopK" in kind:
        tensors |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(cut)}
    if kind.startswith("Mat"):
        tensors["group_sizes"] = torch.tensor([5, D_SAE - 5])
    if kind.startswith("Jump"):
        tensors["threshold"] = torch.from_numpy(draw.positive(D_SAE))
    return tensors


def config(kind, **trainer):
    k = {"k": K} if "TopK" in kind else {}
    said = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, **k, "layer": 3, "lm_name": "gemma-2-2b"}
    return {"trainer": said | {"submodule_name": "resid_post_layer_3"} | trainer, "buffer": {"ctx_len": 128}}


def write(folder, kind="AutoEncoder", cut=CUT, **trainer):
    tensors = state(kind, cut)
    write_json(folder / "config.json", config(kind, **trainer))
    torch.save(tensors, folder / "ae.pt")
    return folder, reference(kind, tensors)


def reference(kind, tensors):
    """What the library's own encode and decode do, by the class."""
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    W_enc = t["W_enc"] if "W_enc" in t else t["encoder.weight"].T
    W_dec = t["W_dec"] if "W_dec" in t else t["decoder.weight"].T
    b_dec = next(t[name] for name in ("bias", "b_dec", "decoder_bias", "decoder.bias") if name in t)
    subtracted = 0 if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else b_dec

    def f(x):
        g = (x - subtracted) @ W_enc
        if kind == "GatedAutoEncoder":
            gate, magnitude = g + t["gate_bias"], np.exp(t["r_mag"]) * g + t["mag_bias"]
            acts, margin = (gate > 0) * relu(magnitude), np.minimum(np.abs(gate), np.abs(magnitude)).min(1)
            return acts, acts @ W_dec + b_dec, margin
        h = g + (t["b_enc"] if "b_enc" in t else t["encoder.bias"])
        if kind == "AutoEncoderTopK" or ("TopK" in kind and t["threshold"] < 0):
            acts, margin = top(h, K)
            acts = relu(acts)
        else:
            cut = t.get("threshold", 0.0)
            acts, margin = relu(h) * (relu(h) > cut), np.abs(h - cut).min(1)
        return acts, acts @ W_dec + b_dec, margin

    return f
