"""Dunefsky's and Chlenski's pickles, with a config of a class that is not there."""

import gzip
import pickle
import sys
from dataclasses import dataclass, make_dataclass
from types import ModuleType

import numpy as np
import torch
from rigs.format_files import D_IN, D_OUT, D_SAE, Draw, relu

NAME = "final_sparse_autoencoder_gpt2-small_blocks.8.ln2.hook_normalized_24576"
FIELDS = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.ln2.hook_normalized",
    "out_hook_point": "blocks.8.hook_mlp_out",
    "hook_point_head_index": None,
    "is_transcoder": True,
    "context_size": 128,
    "dataset_path": "Skylion007/openwebtext",
    "dtype": torch.float32,
    "device": torch.device("cuda"),
}


@dataclass
class Saved:
    """A config of sae_training while that package is there."""

    fields: dict

    def __enter__(self):
        self.modules = {"sae_training": ModuleType("sae_training"), "sae_training.config": ModuleType("config")}
        sys.modules.update(self.modules)
        made = make_dataclass("LanguageModelSAERunnerConfig", self.fields)
        made.__module__ = "sae_training.config"
        self.modules["sae_training.config"].LanguageModelSAERunnerConfig = made
        return made(**self.fields)

    def __exit__(self, *_):
        for name in self.modules:
            del sys.modules[name]


def write(root, suffix=".pt", more=None, wanted_mean=False, **fields):
    fields, draw = {**FIELDS, **fields}, Draw()
    d_out = D_OUT if fields["is_transcoder"] else D_IN
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, d_out), "b_dec": (D_IN,)}
    shapes |= {"b_dec_out": (d_out,)} if fields["is_transcoder"] else {}
    tensors = {name: torch.from_numpy(draw(*shape)) for name, shape in shapes.items()}
    root.mkdir(parents=True, exist_ok=True)
    with Saved(fields) as cfg:
        pair = {"cfg": cfg, "state_dict": {**tensors, **(more or {})}}
        if suffix == ".pt":
            torch.save(pair, root / f"{NAME}.pt")
        else:
            with gzip.open(root / f"{NAME}.pkl.gz", "wb") as file:
                pickle.dump(pair, file)
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    return root, lambda x: reference(x, wanted_mean, **arrays)


def reference(x, centered, W_enc, b_enc, W_dec, b_dec, b_dec_out=None):
    mean = x.mean(1, keepdims=True) if centered else 0
    h = (x - mean - b_dec) @ W_enc + b_enc
    return relu(h), relu(h) @ W_dec + (b_dec if b_dec_out is None else b_dec_out) + mean, np.abs(h).min(1)
