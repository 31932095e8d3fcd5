"""Kissane's coders of attention outputs, and the warning about the biases of the values."""

import logging

import numpy as np
import pytest
import torch
from rigs.format_files import D_IN, D_SAE, Draw, agrees, loads, relu, write_json

import sae
from sae.base.errors import DataError
from sae.loading import hub

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


def test_it_warns_that_the_models_own_activations_are_larger(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        coder = loads(*write(tmp_path))
    site = coder.spec.reads[0]
    assert (site.hook, site.model) == ("blocks.5.attn.hook_z", "openai-community/gpt2")
    assert coder.spec.context_length == 128
    assert "larger by the constant b_V at blocks.5.attn.hook_z" in caplog.text


def test_several_lie_beside_each_other(tmp_path):
    _, wanted = write(tmp_path)
    write(tmp_path, "blocks.6.attn.hook_z", name="other")
    assert set(hub.load_all(tmp_path)) == {f"{NAME}.pt", "other.pt"}
    agrees(sae.load(tmp_path / f"{NAME}.pt"), wanted)


@pytest.mark.parametrize(
    ("model", "hook", "centered"),
    [
        ("gelu-2l", "blocks.0.hook_mlp_out", True),
        ("gelu-2l", "blocks.0.mlp.hook_post", False),
        ("gemma-2b", "blocks.0.hook_mlp_out", False),
    ],
)
def test_the_mean_of_what_reaches_the_stream_is_taken_out_where_transformerlens_does(
    tmp_path, caplog, model, hook, centered
):
    folder, wanted = write(tmp_path, hook, model)

    def of_raw(x):
        mean = x.mean(1, keepdims=True) if centered else 0
        acts, out, margin = wanted(x - mean)
        return acts, out + mean, margin

    with caplog.at_level(logging.WARNING):
        loads(folder, of_raw)
        loads(folder, of_raw, site="transformer.h.0.mlp")  # whatever it is called here
    assert "b_V" not in caplog.text


def test_another_tensor_or_size_is_refused(tmp_path):
    folder, _ = write(tmp_path, b_mid=torch.ones(2))
    with pytest.raises(DataError, match="tensor b_mid is not part of this format"):
        sae.load(folder)
    folder, _ = write(tmp_path, W_enc=torch.ones(D_SAE, D_IN))
    with pytest.raises(DataError, match="tensor W_enc has shape"):
        sae.load(folder)
