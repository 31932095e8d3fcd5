"""Kissane's coders of attention outputs, as they were released."""

import numpy as np
import torch
from rigs.format_files import D_IN, D_SAE, Draw, relu, write_json

NAME = "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9"


def write(root, hook="blocks.5.attn.hook_z", model="gpt2-small", name=NAME, **more):
    draw = Draw()
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    tensors = {name: torch.from_numpy(draw(*shape)) for name, shape in shapes.items()}
    sizes = {"act_size": D_IN, "dict_size": D_SAE, "seq_len": 128}
    write_json(root / f"{name}_cfg.json", {**sizes, "act_name": hook, "model_name": model, "layer": 5})
    torch.save({**tensors, **more}, root / f"{name}.pt")
    return root, lambda x: reference(x, **{name: tensor.double().numpy() for name, tensor in tensors.items()})


def reference(x, W_enc, W_dec, b_enc, b_dec):
    h = (x - b_dec) @ W_enc + b_enc
    return relu(h), relu(h) @ W_dec + b_dec, np.abs(h).min(1)
