"""The ground-truth bench: its data are what it says, its scores are right for coders of known worth, and what the
papers claim of their rules on such data (slow: three seeds each).
"""

import pytest
import torch

from sae.coder import SparseCoder
from sae.selection.relu import ReLU
from sae.spec import CoderSpec
from sae.synthetic import Synthetic, score


def test_the_data_are_what_they_say():
    truth = Synthetic(noise=0.0, spread=0.0)
    x, codes = truth.sample(200_000)
    assert truth.directions.norm(dim=1).sub(1).abs().max() < 1e-5
    torch.testing.assert_close(x, codes @ truth.directions)
    fired = (codes > 0).float().mean(0)
    assert float(fired.sum()) == pytest.approx(3.5, rel=0.02)
    torch.testing.assert_close(fired, truth.rates, rtol=0.1, atol=1e-3)
    assert float(codes[codes > 0].mean()) == pytest.approx(1.0, rel=0.02)
    assert torch.equal(truth.sample(5, "a")[0], truth.sample(5, "a")[0])
    assert not torch.equal(truth.sample(5, "a")[0], truth.sample(5, "b")[0])
    heavy = (Synthetic().sample(50_000)[1] > 0).sum(1).float()
    assert heavy.std() > 1.3 * (codes > 0).sum(1).float().std(), "a heavy-tailed number of directions per token"


def test_the_true_dictionary_is_matched_and_an_unrelated_one_is_not():
    truth = Synthetic(d=96, n_directions=48, noise=0.0)
    coder = SparseCoder(CoderSpec(96, 96, 48, ReLU(), pre_bias="none"))
    with torch.no_grad():
        coder.W_enc.copy_(torch.linalg.pinv(truth.directions).T)  # exact codes: the directions are independent
        coder.W_dec.copy_(truth.directions)
        coder.b_enc.fill_(-1e-4)
    found = score(coder, truth, 2048)
    assert found["fvu"] < 1e-3
    assert found["matched_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["matched_f1"] > 0.99
    with torch.no_grad():
        coder.W_dec.copy_(torch.nn.functional.normalize(torch.randn(48, 96), dim=1))
        coder.b_enc[:12] = -1e9
    other = score(coder, truth, 2048)
    assert other["dead_share"] >= 0.25
    assert other["matched_cosine"] < 0.5 > other["matched_f1"]
    assert other["fvu"] > 0.5
