"""Dunefsky's and Chlenski's pickles, whose config is of a class that is not there."""

import gzip
import logging
import pickle
import sys
from dataclasses import dataclass, make_dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from rigs.format_files import D_IN, D_OUT, D_SAE, Draw, loads, relu

import sae
from sae.base.errors import ConfigError, DataError

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


@pytest.mark.parametrize("suffix", [".pt", ".pkl.gz"])
def test_a_transcoder_is_read_without_the_package_of_its_config(tmp_path, suffix, caplog):
    folder, wanted = write(tmp_path, suffix)
    assert not any(name.startswith("sae_training") for name in sys.modules)
    with caplog.at_level(logging.WARNING):
        spec = loads(folder, wanted).spec
    assert [site.hook for site in (*spec.reads, *spec.writes)] == [FIELDS["hook_point"], FIELDS["out_hook_point"]]
    assert {site.model for site in (*spec.reads, *spec.writes)} == {"openai-community/gpt2"}
    assert (spec.pre_bias, spec.context_length) == ("own", 128)
    assert "what the model itself writes at blocks.8.hook_mlp_out has one" in caplog.text
    assert not any(name.startswith("sae_training") for name in sys.modules)


def test_the_trainers_autoencoders_too(tmp_path):
    hooks = {"is_transcoder": False, "hook_point": "blocks.6.hook_resid_pre", "out_hook_point": None}
    spec = loads(*write(tmp_path / "gpt2", wanted_mean=True, **hooks)).spec
    assert (spec.pre_bias, spec.normalization.kind, spec.reads[0].hook) == ("decoder", "center", hooks["hook_point"])
    assert spec.writes == spec.reads
    loads(*write(tmp_path / "gemma", model_name="gemma-2b", **hooks))


def test_the_user_may_say_where_it_reads_and_writes(tmp_path):
    spec = loads(*write(tmp_path), site="a.b->c.d", model="m").spec
    assert [(site.hook, site.model) for site in (*spec.reads, *spec.writes)] == [("a.b", "m"), ("c.d", "m")]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"more": {"b_mid": torch.ones(2)}}, DataError, "tensor b_mid is not part of this format"),
        ({"is_transcoder": False, "more": {"b_dec_out": torch.ones(5)}}, DataError, "tensor b_dec_out is not part of"),
        ({"hook_point_head_index": 3}, ConfigError, "^hook_point_head_index: .* reads one head"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, error, message):
    folder, _ = write(tmp_path, **change)
    with pytest.raises(error, match=message):
        sae.load(folder)


def test_a_pickle_of_another_package_is_refused_by_name(tmp_path):
    torch.save({"cfg": np.random.default_rng(), "state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(DataError, match="wants to import numpy"):
        sae.load(tmp_path)
