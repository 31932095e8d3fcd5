"""Gemma Scope 1, as it was released."""

import numpy as np
from rigs.format_files import D_IN, D_SAE, Draw, relu


def write(root, path, d_in=D_IN, d_out=D_IN, upper=True):
    draw, folder = Draw(), root / path
    folder.mkdir(parents=True)
    tensors = {
        "W_enc": draw(d_in, D_SAE),
        "W_dec": draw(D_SAE, d_out),
        "b_enc": draw(D_SAE),
        "b_dec": draw(d_out),
        "threshold": draw.positive(D_SAE),
    }
    np.savez(folder / "params.npz", **{n if upper else n.lower(): t for n, t in tensors.items()})
    return folder, lambda x: reference(x, **{n: t.astype(np.float64) for n, t in tensors.items()})


def reference(x, W_enc, W_dec, b_enc, b_dec, threshold):
    h = x @ W_enc + b_enc
    acts = relu(h) * (h > threshold)
    return acts, acts @ W_dec + b_dec, np.abs(h - threshold).min(1)
