"""circuit-tracer's sets of transcoders, as they were released."""

import numpy as np
import yaml
from rigs.format_files import D_IN, D_OUT, D_SAE, Draw, relu, top
from safetensors.numpy import save_file

K, THRESHOLD = 9, "activation_function.threshold"
CONFIG = {
    "model_name": "Qwen/Qwen3-4B",
    "model_kind": "transcoder_set",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "hook_mlp_out",
    "scan": "mwhanna/qwen3-4b-transcoders",
}


def write(root, rule="relu", config=CONFIG, layer=7, skip=False, d_out=D_OUT, d_sae=D_SAE, turned=False):
    draw = Draw(layer)
    root.mkdir(parents=True, exist_ok=True)
    tensors = {
        "W_enc": draw(d_sae, D_IN),
        "W_dec": draw(d_sae, d_out, scale=0.1 if rule == "top128" else 1.0),  # or so long a sum loses digits
        "b_enc": draw(d_sae),
        "b_dec": draw(d_out),
    }
    tensors |= {THRESHOLD: draw.positive(d_sae)} if rule == "jumprelu" else {}
    tensors |= {"W_skip": draw(d_out, D_IN)} if skip else {}
    stored = {**tensors, "W_dec": np.ascontiguousarray(tensors["W_dec"].T)} if turned else tensors
    save_file(stored, root / f"layer_{layer}.safetensors")
    if config:
        (root / "config.yaml").write_text(yaml.safe_dump(config))
    exact = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    k = 128 if rule == "top128" else K
    return root, lambda x: reference(x, exact, k if rule.startswith("top") else None)


def reference(x, p, k):
    h = x @ p["W_enc"].T + p["b_enc"]
    if k:  # there is no ReLU in it
        acts, margin = top(h, k)
    elif THRESHOLD in p:
        acts, margin = h * (h > p[THRESHOLD]), np.abs(h - p[THRESHOLD]).min(1)
    else:
        acts, margin = relu(h), np.abs(h).min(1)
    out = acts @ p["W_dec"] + p["b_dec"]
    return acts, out + x @ p["W_skip"].T if "W_skip" in p else out, margin
