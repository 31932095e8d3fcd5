"""Llamascopium's coders, as the library saves them."""

import numpy as np
import torch
from rigs.format_files import D_IN, D_SAE, Draw, relu, top, write_json
from safetensors.torch import save_file

K, H = 4, 3
IN, OUT = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(H)], [f"blocks.{n}.hook_mlp_out" for n in range(H)]
NORM = "dataset_average_activation_norm."
PLAIN = {"sae_type": "sae", "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post"}
TRANSCODER = {"sae_type": "sae", "hook_point_in": IN[0], "hook_point_out": OUT[0]}
CROSSCODER = {"sae_type": "crosscoder", "hook_points": [f"blocks.{layer}.hook_resid_post" for layer in range(H)]}
CLT = {"sae_type": "clt", "hook_points_in": IN, "hook_points_out": OUT}


def release(root, kind=PLAIN, path="x", linear=False, tensors=(), dtype=torch.float32, even=False, **change):
    """Writes a coder as the library saves it; returns its folder and the reference of its map.

    `linear` stores the layers of 2025; `even` makes the decoder norms of a crosscoder the same at all hooks.
    """
    config = {
        "d_model": D_IN,
        "expansion_factor": D_SAE / D_IN,
        "use_decoder_bias": True,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": K,
        "jumprelu_threshold_window": 2.0,
        **kind,
        **change,
    }
    config = {name: value for name, value in config.items() if value != "left out"}
    draw, hooks = Draw(), list(dict.fromkeys([*ins(config), *outs(config)]))
    heads = (H,) if "hook_points" in kind or "hook_points_in" in kind else ()
    stored = {"W_E": draw(*heads, D_IN, D_SAE, scale=0.4), "b_E": draw(*heads, D_SAE, scale=0.4)}
    if kind is CLT:
        stored |= {f"W_D.{layer}": draw(layer + 1, D_SAE, D_IN) for layer in range(H)}
        stored |= {f"b_D.{layer}": draw(D_IN) for layer in range(H)}
    else:
        stored |= {"W_D": draw(*heads, D_SAE, D_IN), "b_D": draw(*heads, D_IN)}
    if even:
        stored["W_D"] *= draw.positive(D_SAE)[:, None] / np.linalg.norm(stored["W_D"], axis=2, keepdims=True)
    if config.get("use_glu_encoder"):
        stored |= {"W_E_glu": draw(D_IN, D_SAE), "b_E_glu": draw(D_SAE)}
    if config["act_fn"] == "jumprelu":
        shape = (H, D_SAE) if kind is CLT else (D_SAE,)
        stored["activation_function.log_jumprelu_threshold"] = np.log(draw.positive(*shape))
    stored |= {NORM + hook: draw.positive(1)[0] for hook in hooks}
    if not config["use_decoder_bias"]:
        stored.pop("b_D")
    stored = {name: torch.as_tensor(t, dtype=dtype).contiguous() for name, t in stored.items()}
    wanted = {name: t.double().numpy() for name, t in stored.items()}
    if linear:
        for name, weight in (("E", "encoder.weight"), ("D", "decoder.weight"), ("E_glu", "encoder_glu.weight")):
            if f"W_{name}" in stored:
                stored[weight] = stored.pop(f"W_{name}").T.contiguous()
                if f"b_{name}" in stored:
                    stored[weight.replace("weight", "bias")] = stored.pop(f"b_{name}")
        stored["log_jumprelu_threshold"] = stored.pop("activation_function.log_jumprelu_threshold")
    stored |= dict(tensors)
    folder = root / path
    write_json(folder / "config.json", config)
    save_file({name: t for name, t in stored.items() if t is not None}, folder / "sae_weights.safetensors")
    return folder, lambda x: reference(x, wanted, config)


def ins(config):
    return config.get("hook_points") or config.get("hook_points_in") or [config["hook_point_in"]]


def outs(config):
    return config.get("hook_points") or config.get("hook_points_out") or [config["hook_point_out"]]


def reference(x, stored, config):
    """Normalizes, encodes, decodes and denormalizes as the library's models do; latents as [token, latent]."""
    size = np.ones(1)
    if config["norm_activation"] == "dataset-wise":
        s_in, s_out = ([D_IN**0.5 / stored[NORM + hook] for hook in side(config)] for side in (ins, outs))
    else:
        s_in, s_out = [1.0] * len(ins(config)), [1.0] * len(outs(config))
    x = x.reshape(len(x), -1, D_IN)  # [token, hook, d]
    if config["norm_activation"] == "token-wise":
        size = np.linalg.norm(x, axis=2, keepdims=True) / D_IN**0.5
    x, undo = x / size * np.array(s_in)[:, None], size / np.array(s_out)[:, None]
    included = config["sparsity_include_decoder_norm"]
    if config.get("sae_type") == "clt":
        h = np.einsum("tld,ldm->tlm", x, stored["W_E"]) + stored["b_E"]
        squares = sum(np.pad((stored[f"W_D.{i}"] ** 2).sum(2), ((0, H - 1 - i), (0, 0))) for i in range(H))
        n = np.sqrt(squares) if included else np.ones((H, D_SAE))
        acts, margin = activate(h * n, stored, config)
        acts = acts / n
        out = [np.einsum("tlm,lmd->td", acts[:, : i + 1], stored[f"W_D.{i}"]) + stored[f"b_D.{i}"] for i in range(H)]
        return acts.reshape(len(x), -1), (np.stack(out, 1) * undo).reshape(len(x), -1), margin
    if config.get("sae_type") == "crosscoder":
        h = (np.einsum("thd,hdm->thm", x, stored["W_E"]) + stored["b_E"]).sum(1, keepdims=True)
        n = np.linalg.norm(stored["W_D"], axis=2)
        acts, margin = activate(h * n, stored, config)
        acts = acts / n
        out = np.einsum("thm,hmd->thd", acts, stored["W_D"]) + stored["b_D"]
        assert np.allclose(acts, acts[:, :1])
        return acts[:, 0], (out * undo).reshape(len(x), -1), margin
    y = x[:, 0] - (stored["b_D"] if config.get("apply_decoder_bias_to_pre_encoder") else 0)
    h = y @ stored["W_E"] + stored["b_E"]
    if config.get("use_glu_encoder"):
        h = h / (1 + np.exp(-(y @ stored["W_E_glu"] + stored["b_E_glu"])))
    n = np.linalg.norm(stored["W_D"], axis=1) if included else np.ones(D_SAE)
    acts, margin = activate((h * n)[:, None], stored, config)
    acts = acts[:, 0] / n
    out = acts @ stored["W_D"] + stored.get("b_D", 0)
    return acts, (out[:, None] * undo).reshape(len(x), -1), margin


def activate(h, stored, config):
    """Returns act_fn of [token, hook or layer, latent], and each token's distance from where a latent comes or goes."""
    act = config["act_fn"]
    if act == "relu":
        return relu(h), np.abs(h).min((1, 2))
    if act == "jumprelu":
        threshold = np.exp(stored["activation_function.log_jumprelu_threshold"])
        return np.where(h > threshold, h, 0), np.abs(h - threshold).min((1, 2))
    rows = h.reshape(len(h), -1) if "layer" in act else h.reshape(-1, h.shape[2])
    kept, margin = top(rows, config["top_k"])
    return relu(kept).reshape(h.shape), margin.reshape(len(h), -1).min(1)
