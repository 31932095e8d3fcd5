"""OpenAI's coders of GPT-2 small: versions with ReLU and with TopK behind a layer norm."""

import pytest
import torch
from rigs.format_files import D_IN, D_SAE, loads
from rigs.released.openai import K, write

import sae
from sae.base.errors import DataError


@pytest.mark.parametrize(
    ("path", "activation", "hook"),
    [
        ("resid_delta_attn_v5_32k/autoencoders/0.pt", "TopK", "blocks.0.hook_attn_out"),
        ("resid_post_attn_v5_128k/autoencoders/3.pt", "TopK", "blocks.3.hook_resid_mid"),
        ("resid_post_mlp_v5_32k/autoencoders/11.pt", "TopK", "blocks.11.hook_resid_post"),
        ("resid_delta_mlp_v4/autoencoders/6.pt", "ReLU", "blocks.6.hook_mlp_out"),
        ("mlp_post_act/autoencoders/2.pt", "ReLU", "blocks.2.mlp.hook_post"),
        ("mlp_post_act/autoencoders/2.pt", None, "blocks.2.mlp.hook_post"),
    ],
)
def test_every_version_at_its_site(tmp_path, path, activation, hook):
    file, wanted = write(tmp_path, path, activation)
    for address in (file, file.parent, tmp_path):
        coder = loads(address, wanted)
        site = coder.spec.reads[0]
        assert (site.hook, site.model, coder.spec.context_length) == (hook, "openai-community/gpt2", 64)


def test_normalization_is_undone_with_the_tokens_own_mean_and_spread(tmp_path):
    file, wanted = write(tmp_path)
    for x_scale in (0.05, 20.0):
        loads(file, wanted, x_scale=x_scale)


def test_a_file_elsewhere_has_the_site_that_is_said(tmp_path):
    file, wanted = write(tmp_path, "mine.pt")
    assert loads(file, wanted).spec.reads == ()
    assert loads(file, wanted, site="transformer.h.6").spec.reads[0].hook == "transformer.h.6"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"activation": "JumpReLU"}, "activation is 'JumpReLU'; known are ReLU, TopK"),
        ({"activation": "Identity"}, "activation is 'Identity'"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "postact_fn is 'Identity'; known are ReLU"),
        ({"activation_state_dict": {}}, "activation_state_dict.k is None"),
        ({"scale": torch.ones(1)}, "tensor scale is not part of this format"),
        ({"decoder.weight": torch.ones(D_SAE, D_IN)}, "tensor decoder.weight has shape"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, more, message):
    file, _ = write(tmp_path, **more)
    with pytest.raises(DataError, match=message):
        sae.load(file)
