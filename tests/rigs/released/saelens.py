"""SAELens' coders, as its versions save them."""

import numpy as np
from rigs.format_files import D_IN, D_OUT, D_SAE, Draw, relu, top, write_json
from safetensors.numpy import save_file

RESIDUAL = "blocks.3.hook_resid_post"


def drawn(architecture, seed=0):
    """The tensors of an inference file."""
    draw, d_out = Draw(seed), D_OUT if "transcoder" in architecture else D_IN
    tensors = {"W_enc": draw(D_IN, D_SAE), "W_dec": draw(D_SAE, d_out), "b_enc": draw(D_SAE), "b_dec": draw(d_out)}
    if architecture == "gated":
        tensors |= {"b_gate": tensors.pop("b_enc"), "r_mag": draw(D_SAE, scale=0.3), "b_mag": draw(D_SAE)}
    if architecture.startswith("jumprelu"):
        tensors["threshold"] = draw.positive(D_SAE)
    if "skip" in architecture:
        tensors["W_skip"] = draw(d_out, D_IN)
    if architecture == "matching_pursuit":
        tensors = {"W_dec": 0.6 * tensors["W_dec"], "b_dec": tensors["b_dec"]}
    return tensors


def config6(architecture, hook=RESIDUAL, written="blocks.3.hook_mlp_out", **more):
    """A config as version 6 saves it."""
    metadata = {"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12", "model_name": "gpt2-small"}
    metadata |= {"hook_name": hook, "hook_head_index": None, "prepend_bos": True, "context_size": 128}
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    if architecture in ("topk", "abstopk"):
        config |= {"k": 3, "rescale_acts_by_decoder_norm": False}
    if "transcoder" in architecture:
        config |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
        metadata["hook_name_out"] = written
    return {**config, "metadata": metadata | more.pop("metadata", {}), **more}


def config3(**more):
    """A config as version 3 saves it: flat."""
    config = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu"}
    config |= {"model_name": "gpt2-small", "hook_name": RESIDUAL, "hook_layer": 3, "hook_head_index": None}
    config |= {"activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": False}
    config |= {"finetuning_scaling_factor": False, "sae_lens_training_version": "4.1.0", "prepend_bos": True}
    config |= {"dataset_path": "some/text", "context_size": 64, "normalize_activations": "none"}
    return {**config, "neuronpedia_id": None, "model_from_pretrained_kwargs": {}, **more}


def saved(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cfg.json", config)
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def normalized(kind, x):
    """What each normalization does, and what undoes it."""
    if kind == "layer_norm":
        mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
        return (x - mean) / (std + 1e-5), lambda out: out * std + mean
    if kind == "constant_norm_rescale":
        factor = D_IN**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
        return x * factor, lambda out: out / factor
    return x, lambda out: out


def pursuit(y, W_dec, residual_threshold=1e-2, max_iterations=None, stop_on_duplicate_support=True):
    acts, margin, rest = np.zeros((len(y), len(W_dec))), np.full(len(y), np.inf), y.copy()
    for t in range(len(y)):
        for _ in range(max_iterations or y.shape[1]):
            scores = np.sort(rest[t] @ W_dec.T)
            best, value = np.argmax(rest[t] @ W_dec.T), max(scores[-1], 0)
            margin[t] = min(margin[t], scores[-1] - scores[-2], abs(scores[-1]))
            known = acts[t, best] != 0 or value == 0
            acts[t, best] += value
            rest[t] -= value * W_dec[best]
            norm = np.linalg.norm(rest[t])
            margin[t] = min(margin[t], abs(norm - residual_threshold))
            if (known and stop_on_duplicate_support) or norm < residual_threshold:
                break
    return acts, margin


def reference(config, tensors):
    """SAELens' encode and decode of a version 6 config, in float64."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    kind, subtracts, n = config["architecture"], config["apply_b_dec_to_input"], np.linalg.norm(t["W_dec"], axis=1)

    def run(x):
        y, undo = normalized(config["normalize_activations"], x)
        undo = undo if "transcoder" not in kind else lambda out: out
        y = y - t["b_dec"] if subtracts else y
        if kind == "matching_pursuit":
            acts, margin = pursuit(y, t["W_dec"], **{k: v for k, v in config.items() if k in saelens_pursuit})
            return acts, undo(acts @ t["W_dec"] + (t["b_dec"] if subtracts else 0)), margin
        if kind == "gated":
            gate, mag = y @ t["W_enc"] + t["b_gate"], y @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"]
            acts, margin = (gate > 0) * relu(mag), np.minimum(np.abs(gate), np.abs(mag)).min(1)
            return acts, undo(acts @ t["W_dec"] + t["b_dec"]), margin
        h = y @ t["W_enc"] + t["b_enc"]
        factor = n if config.get("rescale_acts_by_decoder_norm") else np.ones(len(n))
        if kind == "topk":
            acts, margin = top(h * factor, config["k"])
            acts = relu(acts)
        elif kind == "abstopk":
            size, margin = top(np.abs(h * factor), config["k"])
            acts = np.sign(h) * size
        else:
            threshold = t.get("threshold", np.zeros(len(n)))
            acts = relu(h) * (h > threshold)
            margin = np.minimum(np.abs(h - threshold), np.abs(h)).min(1)
        skipped = x @ t["W_skip"].T if "skip" in kind else 0
        return acts, undo(acts / factor @ t["W_dec"] + t["b_dec"]) + skipped, margin

    return run


saelens_pursuit = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
