"""sparsify's coders, as its trainer leaves them; and coders of ours to write in its format."""

import numpy as np
import torch
from rigs.format_files import D_IN, D_SAE, Draw, relu, top, write_json
from safetensors.torch import save_file

from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection.topk import TopK

K = 5
SKIP = {"transcode": True, "skip_connection": True}


def release(run, name="layers.10", old=(), config=(), tensors=(), root=True, d_out=D_IN, dtype="float32"):
    """Writes a coder as sparsify's trainer leaves it; returns its folder, and the reference of its map."""
    full = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_IN,
    }
    cfg = {key: value for key, value in (full | dict(config)).items() if key not in old}
    draw, folder = Draw(), run / name
    stored = {
        "encoder.weight": draw(D_SAE, D_IN),
        "encoder.bias": draw(D_SAE),
        "W_dec": draw(D_SAE, d_out),
        "b_dec": draw(d_out),
        "W_skip": draw(d_out, D_IN),
    }
    if not cfg.get("skip_connection"):
        stored.pop("W_skip")
    stored = {key: torch.from_numpy(t.astype(dtype)) for key, t in stored.items()}
    for key, change in dict(tensors).items():
        stored[key] = change(stored)
    write_json(folder / "cfg.json", cfg)
    save_file({key: t.contiguous() for key, t in stored.items() if t is not None}, folder / "sae.safetensors")
    if root:
        write_json(run / "config.json", {"model": "EleutherAI/pythia-70m", "dataset": "d", "ctx_len": 64, "sae": {}})
    return folder, lambda x, **how: reference(
        x, {key: t.double().numpy() for key, t in stored.items() if t is not None}, cfg, **how
    )


def reference(x, stored, cfg, subtract=None):
    subtract = not cfg["transcode"] if subtract is None else subtract
    y = x - stored["b_dec"] if subtract else x
    h = y @ stored["encoder.weight"].T + stored["encoder.bias"]
    if cfg.get("signed"):
        kept, margin = top(np.abs(h), cfg["k"])
        acts = h * (kept > 0)
    elif cfg.get("activation") == "groupmax":
        groups = relu(h).reshape(len(h), cfg["k"], -1)
        best = groups.argmax(2)[:, :, None]
        acts = np.where(np.arange(groups.shape[2]) == best, groups, 0).reshape(len(h), -1)
        order = np.sort(h.reshape(groups.shape), axis=2)
        margin = np.minimum((order[:, :, -1] - order[:, :, -2]).min(1), np.abs(h).min(1))
    else:
        kept, margin = top(h, cfg["k"])
        acts = relu(kept)
    out = acts @ stored["W_dec"] + stored["b_dec"]
    return acts, out + x @ stored["W_skip"].T if "W_skip" in stored else out, margin


def coder(pre_bias="decoder", side="output", selection=None, **fields):
    draw, site = Draw(7), Site("model.layers.1", side, "m", "abc")
    reads, writes = (site,), (Site("model.layers.1", "output", "m", "abc"),)
    spec = CoderSpec(D_IN, D_IN, D_SAE, selection or TopK(K), reads, writes, pre_bias=pre_bias, context_length=32)
    made = SparseCoder(spec.with_(**fields)).requires_grad_(False)
    for tensor in made.parameters():
        tensor.copy_(torch.from_numpy(draw(*tensor.shape)))
    return made
