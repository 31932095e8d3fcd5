"""Crosscoders of two models, as their authors save them."""

import numpy as np
import torch
from rigs.format_files import D_IN, D_SAE, Draw, relu, write_json

SCALES = (0.5, 2.0)


def write(folder, names=("3.pt", "3_cfg.json"), scales=SCALES, **more):
    draw = Draw()
    shapes = {"W_enc": (2, D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, 2, D_IN), "b_dec": (2, D_IN)}
    tensors = {name: torch.from_numpy(draw(*shape)) for name, shape in shapes.items()}
    said = {"d_in": D_IN, "dict_size": D_SAE, "seq_len": 1024, "model_name": "gemma-2-2b", "enc_dtype": "fp32"}
    write_json(folder / names[1], {**said, "hook_point": "blocks.14.hook_resid_pre", "site": "resid_pre"})
    torch.save({**tensors, **more}, folder / names[0])
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    return folder, lambda x: reference(x, np.array(scales)[:, None], **arrays)


def reference(x, scales, W_enc, b_enc, W_dec, b_dec):
    """Of activations [n, 2, d], which come side by side."""
    h = np.einsum("nmd,mdf->nf", x.reshape(len(x), 2, -1) * scales, W_enc) + b_enc
    out = (np.einsum("nf,fmd->nmd", relu(h), W_dec) + b_dec) / scales
    return relu(h), out.reshape(x.shape), np.abs(h).min(1)
