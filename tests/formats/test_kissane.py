"""Kissane's coders of attention outputs, and the warning about the biases of the values."""

import logging

import pytest
import torch
from rigs.format_files import D_IN, D_SAE, agrees, loads
from rigs.released.kissane import NAME, write

import sae
from sae.base.errors import DataError
from sae.loading import hub


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
