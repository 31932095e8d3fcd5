"""What is said of a coder, in its repr."""

import pytest
import torch

from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection import Selection
from sae.selection.jumprelu import JumpReLU
from sae.selection.topk import TopK

STREAM, MLP = (
    Site("model.layers.1", model="tiny/llama", width=6),
    Site("model.layers.1.mlp", model="tiny/llama", width=6),
)
SIX = tuple(Site(f"layers.{i}", model="m", width=6) for i in range(6))
K = TopK(4)
MEASURED = {"reconstruction": {"fvu": 0.12304, "l0": 4.0}, "density": {}}


def spec(reads=(STREAM,), writes=None, d_in=6, d_out=6, m=24, rule: Selection = K, **how):
    return CoderSpec(d_in, d_out, m, rule, tuple(reads), tuple(reads if writes is None else writes), **how)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            spec(metrics=MEASURED),
            "sparse autoencoder of model.layers.1 of tiny/llama, 6 -> 24, topk of 4, FVU 0.1230, L0 4.0",
        ),
        (spec(()), "sparse autoencoder, 6 -> 24, topk of 4"),
        (spec(metrics={"advertised": {"l0": 59.0}}), "6 -> 24, topk of 4, L0 59 (advertised)"),
        (
            spec(writes=[MLP]),
            "transcoder of model.layers.1 of tiny/llama -> model.layers.1.mlp of tiny/llama, 6 -> 24 -> 6",
        ),
        (
            spec(SIX, d_in=36, d_out=36),
            "crosscoder of layers.0, layers.1, layers.2, layers.3, ... (6) of m, 36 -> 24, topk",
        ),
        (
            spec(SIX[:2], d_in=12, d_out=12, cross_layer=True, pre_bias="none"),
            "cross-layer transcoder of layers.0, layers.1 of m, 12 -> 24, topk of 4",
        ),
        (spec(rule=JumpReLU()), "6 -> 24, jumprelu, threshold 0.25"),
        (spec(calibration=(0.5,)), "topk of 4, threshold 0.5"),
        (spec(metrics={"reconstruction": {"fvu": "low", "l0": None}, "advertised": [3]}), "topk of 4, W_enc"),
        (spec([Site("\x1b[31m", model="m")]), "autoencoder of ?[31m of m"),
        (spec([Site("a\n<b>", model="m")]), "sparse autoencoder of a <b> of m,"),
    ],
)
def test_the_repr_of_a_coder_is_one_line(made, said):
    coder = SparseCoder(made)
    if "threshold" in coder.per_latent():
        coder.get_parameter("threshold").data.fill_(0.25)
    text = repr(coder)
    assert said in text
    assert text.startswith("SparseCoder(")
    assert text.endswith(", W_enc [d_sae, d_in])")
    assert "\n" not in text
    assert len(text) < 200
    assert repr(coder.to("meta")).startswith("SparseCoder(")
    with torch.device("meta"):
        assert repr(SparseCoder(made, "meta"))


def test_a_notebook_shows_all_that_a_coder_is():
    site = Site("model.layers.2", model="<script>alert(1)</script>\u202e", width=8)
    metrics = {"reconstruction": {"fvu": 0.25, "l0": 4.0}, "density": {"dead_share": 0.125}}
    page = SparseCoder(CoderSpec(8, 8, 32, TopK(4), (site,), (site,), metrics=metrics))._repr_html_()
    for name, text in (("latents", "32 (d_in 8, d_out 8)"), ("selection", "topk of 4"), ("FVU", "0.25"), ("L0", "4")):
        assert f">{name}</td>" in page
        assert f">{text}</td>" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "\u202e" not in page
