"""circuit-tracer's cross-layer transcoders, as they were released."""

import numpy as np
from rigs.format_files import D_IN, D_OUT, Draw, relu
from safetensors.numpy import save_file

LAYERS, M = 3, 20
CONFIG = """model_name: meta-llama/Llama-3.2-1B
model_kind: cross_layer_transcoder
feature_input_hook: hook_resid_mid
feature_output_hook: hook_mlp_out
"""


def write(root, jumps=True, skip=False, config=CONFIG):
    draw, layers = Draw(), []
    root.mkdir(parents=True, exist_ok=True)
    for i in range(LAYERS):
        layer = {
            "W_enc": draw(M, D_IN),
            "b_enc": draw(M),
            "b_dec": draw(D_OUT),
            "W_dec": draw(M, LAYERS - i, D_OUT),
        }
        layer |= {"threshold": draw.positive(M)} if jumps else {}
        layer |= {"W_skip": draw(D_IN, D_OUT)} if skip else {}
        save_file({f"W_dec_{i}": layer["W_dec"]}, root / f"W_dec_{i}.safetensors")
        rest = {f"{name}_{i}": tensor for name, tensor in layer.items() if name != "W_dec"}
        save_file(rest, root / f"W_enc_{i}.safetensors")
        layers.append({name: tensor.astype(np.float64) for name, tensor in layer.items()})
    if config:
        (root / "config.yaml").write_text(config)
    return root, lambda x: reference(x, layers)


def reference(x, layers):
    x = x.reshape(len(x), LAYERS, -1)
    acts, outs, margin = [], [np.tile(p["b_dec"], (len(x), 1)) for p in layers], np.full(len(x), np.inf)
    for i, p in enumerate(layers):
        h = x[:, i] @ p["W_enc"].T + p["b_enc"]
        threshold = p.get("threshold", 0)
        acts.append(h * (h > threshold) if "threshold" in p else relu(h))
        margin = np.minimum(margin, np.abs(h - threshold).min(1))
        for j in range(i, LAYERS):
            outs[j] = outs[j] + acts[i] @ p["W_dec"][:, j - i]
        if "W_skip" in p:
            outs[i] = outs[i] + x[:, i] @ p["W_skip"]
    return np.concatenate(acts, 1), np.concatenate(outs, 1), margin
