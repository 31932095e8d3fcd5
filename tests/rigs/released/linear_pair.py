"""Goodfire's and qresearch's pairs of linear layers."""

import torch
from rigs.format_files import D_IN, D_SAE, Draw, relu

GOODFIRE, QRESEARCH = ("encoder_linear", "decoder_linear"), ("encoder", "decoder")


def write(root, name="Llama-3.1-8B-Instruct-SAE-l19.pth", layers=GOODFIRE, dtype=torch.float32, **more):
    draw = Draw()
    encoder, decoder = layers
    shapes = {
        f"{encoder}.weight": (D_SAE, D_IN),
        f"{encoder}.bias": (D_SAE,),
        f"{decoder}.weight": (D_IN, D_SAE),
        f"{decoder}.bias": (D_IN,),
    }
    tensors = {name: torch.from_numpy(draw(*shape)).to(dtype) for name, shape in shapes.items()}
    root.mkdir(parents=True, exist_ok=True)
    torch.save({**tensors, **more}, root / name)
    return root, lambda x: reference(x, *(tensor.double().numpy() for tensor in tensors.values()))


def reference(x, W_enc, b_enc, W_dec, b_dec):
    h = x @ W_enc.T + b_enc
    return relu(h), relu(h) @ W_dec.T + b_dec, abs(h).min(1)
