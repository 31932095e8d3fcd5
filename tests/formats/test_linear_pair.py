"""Pairs of linear layers: Goodfire's and qresearch's coders."""

import pytest
import torch
from rigs.format_files import D_SAE, loads
from rigs.released.linear_pair import GOODFIRE, QRESEARCH, write

import sae
from sae.base.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "layers", "dtype", "hook", "model"),
    [
        ("Llama-3.3-70B-Instruct-SAE-l50.pt", GOODFIRE, torch.float32, 50, "meta-llama/Llama-3.3-70B-Instruct"),
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", GOODFIRE, torch.float32, 19, "meta-llama/Llama-3.1-8B-Instruct"),
        (
            "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
            QRESEARCH,
            torch.bfloat16,
            19,
            "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        ),
    ],
)
def test_the_name_says_layer_and_model(tmp_path, name, layers, dtype, hook, model):
    coder = loads(*write(tmp_path, name, layers, dtype))
    site = coder.spec.reads[0]
    assert (site.hook, site.model) == (f"blocks.{hook}.hook_resid_post", model)
    assert coder.spec.pre_bias == "none"


def test_under_another_name_goodfires_layers_are_known_and_the_site_is_what_is_said(tmp_path):
    folder, wanted = write(tmp_path, "mine.pt")
    assert loads(folder, wanted).spec.reads == ()
    assert loads(folder, wanted, site="layers.19", model="m").spec.reads[0].model == "m"


def test_an_encoder_and_a_decoder_alone_are_nobodys(tmp_path):
    folder, wanted = write(tmp_path, "mine.pt", QRESEARCH)
    with pytest.raises(ConfigError, match=r"in no known format; it holds encoder\.weight \[20, 6\]"):
        sae.load(folder)
    loads(folder, wanted, format="linear_pair")


def test_a_tensor_more_makes_it_another_coder(tmp_path):
    folder, _ = write(tmp_path, threshold=torch.ones(D_SAE))
    with pytest.raises(ConfigError, match="in no known format"):
        sae.load(folder)
