"""Small coders as they are released, for tests of the hub; each function returns the folder that it filled."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

import sae
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection.topk import TopK

D_IN, D_SAE = 6, 20
GEMMA = "google/gemma-scope-2b-pt-res"
AJT = "neuronpedia/gpt2-small__res_sce-ajt/2-res_sce-ajt"


def gemma(root, layer=3, l0=59, repo=GEMMA, width=D_SAE):
    folder = root / "models" / repo / f"layer_{layer}/width_16k/average_l0_{l0}"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(layer)
    shapes = {
        "W_enc": (D_IN, width),
        "W_dec": (width, D_IN),
        "b_enc": (width,),
        "b_dec": (D_IN,),
        "threshold": (width,),
    }
    np.savez(folder / "params.npz", **{name: rng.uniform(0.1, 1, shape).astype("f4") for name, shape in shapes.items()})
    return folder


def saelens(root, path, seed=0, **config):
    folder = root / "models" / path
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(D_SAE)}, folder / "sparsity.safetensors")
    said = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": True}
    said |= {"hook_name": "blocks.2.hook_resid_pre", "model_name": "gpt2-small", "normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps(said | config))
    return folder


def native(folder, k=4, site="model.layers.1", metrics=None):
    sites = (Site(site, model="tiny/llama"),)
    coder = SparseCoder(CoderSpec(D_IN, D_IN, D_SAE, TopK(k), sites, sites, metrics=metrics or {}))
    initialize(coder, torch.randn(D_IN), 0)
    sae.save(coder, folder)
    return folder
