"""A model on two devices, of which one is pretended, is read, changed and trained on as on one; nothing mixes them.

It cannot tell how GPUs copy between one another, or how fast.
"""

import pytest
import torch
from rigs.fakes import sampled_rows, tiny_config, tiny_model_folder
from rigs.pretended import DEVICE, Pretended
from rigs.two_devices import spread_over_two

import sae
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.evaluation.evaluation import evaluate
from sae.lm.hooks import capture, capture_with_gradients
from sae.lm.intervene import next_logits
from sae.lm.masking import MaskSpec
from sae.lm.models import load_language_model
from sae.lm.site import Site
from sae.selection.topk import TopK

AWAY = {
    "later layers": ("model.layers.1", "model.norm", "lm_head"),
    "first layers": ("model.embed_tokens", "model.rotary_emb", "model.layers.0"),
}
MASK = MaskSpec((0, 1, 2), 1)
SITES = [Site("model.layers.0"), Site("model.layers.1.mlp", width=16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), initializer_range=0.5)


@pytest.fixture(params=AWAY)
def two(request, folder):
    plain, lm = load_language_model(folder, device="cpu"), load_language_model(folder, device="cpu")
    with Pretended():
        spread_over_two(lm.model, AWAY[request.param])
        yield lm, plain, DEVICE if request.param == "first layers" else torch.device("cpu")


def coder():
    made = SparseCoder(CoderSpec(16, 16, 32, TopK(4), (SITES[1],), (SITES[1],), pre_bias="none", mask=MASK))
    initialize(made, torch.zeros(16), 0)
    return made.requires_grad_(False)


def alike(found, wanted, home):
    """What was read is where inputs go, and equal but for rounding: a pretended device takes no fused products."""
    for name, x in wanted.items():
        assert found[name].device == home
        torch.testing.assert_close(found[name].cpu(), x, rtol=1e-4, atol=1e-4)


def test_places_and_gradients(two):
    lm, plain, home = two
    assert lm.device == home
    assert lm.fingerprint() == plain.fingerprint()
    rows = sampled_rows(plain, 12, 6).data
    lengths = torch.full((len(rows),), 6)
    alike(capture(lm, SITES, rows), capture(plain, SITES, rows), home)
    both = [capture_with_gradients(each, SITES, rows, MASK) for each in (lm, plain)]
    for found, wanted in zip(*both, strict=True):
        alike(found, wanted, home)
    logits = [next_logits(each, rows, lengths) for each in (lm, plain)]
    alike({"logits": logits[0]}, {"logits": logits[1]}, home)


@pytest.mark.slow
def test_evaluation(two):
    lm, plain, home = two
    rows = sampled_rows(plain, 12, 8)
    of = ((coder().to(home), lm), (coder(), plain))
    found, wanted = (evaluate(made, each, rows, 96, progress=False)["loss"] for made, each in of)
    assert found == {name: each and pytest.approx(each, rel=1e-4, abs=1e-7) for name, each in wanted.items()}


@pytest.mark.slow
def test_steering(two):
    lm, plain, home = two
    prompt = sampled_rows(plain, 12, 4).data[0, :5].tolist()
    ask = {"edits": "1=4, 2:add=2", "new_tokens": 3}
    found, wanted = (sae.steer(each, made, prompt, **ask) for each, made in ((lm, coder().to(home)), (plain, coder())))
    assert (found.plain, found.steered) == (wanted.plain, wanted.steered)
    assert found.kl == pytest.approx(wanted.kl, rel=1e-4)


FAMILIES = {
    "gradient_topk": {"coder.selection.type": "gradient_topk"},
    "end to end": {"coder.objectives.kl.type": "kl"},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training(two, tmp_path, monkeypatch, quick, folder, tiny_text, family):
    lm, plain, home = two
    changes = {"activations.prefetch_blocks": 0, "activations.statistics_tokens": 64, "eval.tokens": 64}
    config = tiny_config(folder, tiny_text, {**changes, "tokens": 2 * 128, "kernels": "torch", **FAMILIES[family]})
    monkeypatch.setattr("sae.training.preparing.load_language_model", lambda **_: plain)
    ((name, known),) = sae.train(config, run_dir=tmp_path / "plain", progress=False).metrics.items()
    monkeypatch.setattr("sae.training.preparing.load_language_model", lambda **_: lm)
    found = sae.train(config, run_dir=tmp_path / "two", progress=False)
    assert found.coders[name].W_enc.device == home
    for part, figure in (("reconstruction", "fvu"), ("loss", "ce_spliced"), ("loss", "kl_mean")):
        assert found.metrics[name][part][figure] == pytest.approx(known[part][figure], rel=1e-4, abs=1e-7)
