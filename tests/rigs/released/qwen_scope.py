"""Qwen-Scope, as it was released."""

import torch
from rigs.format_files import D_IN, Draw, relu, top

D_SAE = 1024  # its names count thousands
REPO = "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_50"


def write(root, repo=REPO, k=50, layer=7, d_sae=D_SAE):
    draw, folder = Draw(), root / repo
    shapes = {"W_enc": (d_sae, D_IN), "W_dec": (D_IN, d_sae), "b_enc": (d_sae,), "b_dec": (D_IN,)}
    tensors = {name: torch.from_numpy(draw(*shape)) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    torch.save(tensors, folder / f"layer{layer}.sae.pt")
    return folder, lambda x: reference(x, k, **{name: tensor.double().numpy() for name, tensor in tensors.items()})


def reference(x, k, W_enc, W_dec, b_enc, b_dec):
    h = x @ W_enc.T + b_enc
    acts, margin = top(h, k)
    assert (np_min := acts[acts != 0].min()) > 0, np_min  # so that a ReLU makes no difference
    return relu(acts), acts @ W_dec.T + b_dec, margin
