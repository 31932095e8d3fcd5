"""The ground-truth bench: its data are what it says, its scores are right for coders of known worth, and what the
papers claim of their rules on such data (slow: three seeds each).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.evaluation.synthetic import Synthetic, score
from sae.selection.relu import ReLU


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


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "synthetic.py"


def trained(tmp_path, seed, *families):
    """Returns the scores of coders trained by the benchmark, in a process without this one's checks of every shape."""
    out = tmp_path / "scores.json"
    command = [sys.executable, str(BENCHMARK), *families, "--seeds", str(seed), "--json", str(out)]
    subprocess.run(command, check=True, timeout=1700)
    return {label: by_seed[str(seed)] for label, by_seed in json.loads(out.read_text()).items()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_batch_wide_rules_on_heavy_tailed_data(tmp_path, seed):
    """Mutual Choice beats TopK. Feature Choice leaves no latent dead under thresholds on fresh tokens; phased training
    beats the plain one where latents are ranked by their own firing, and brings nothing where Mutual Choice ranks them.
    """
    own, own_phased = "feature (own density)", "phased (own density)"
    found = trained(tmp_path, seed, "topk", "mutual", "feature", own, own_phased)
    assert found["mutual"]["fvu"] <= 0.85 * found["topk"]["fvu"]
    for name in ("feature", own, own_phased):
        assert found[name]["dead_share"] == 0.0, name
    assert found[own_phased]["fvu"] < found[own]["fvu"]
    assert found["feature"]["fvu"] < found[own]["fvu"]
    for name in ("mutual", "feature", own, own_phased):
        figures = found[name]
        assert figures["l0"] == pytest.approx(figures["batch_l0"], rel=0.05), name
        assert figures["fvu"] <= 1.03 * figures["batch_fvu"], name


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient_selection_leaves_fewer_latents_dead(tmp_path, seed):
    """At beta 0.5 with gradients at inference, as in training, and at beta 2 without them too."""
    found = trained(tmp_path, seed, "topk, no AuxK", "gradient 0.5, no AuxK", "gradient 2, no AuxK")
    dead = {name: figures["dead_share"] for name, figures in found.items()}
    assert dead["gradient 0.5, no AuxK (gradients at inference)"] < dead["topk, no AuxK"]
    assert dead["gradient 2, no AuxK"] < dead["topk, no AuxK"]


@pytest.mark.slow
def test_without_the_heavy_tail_mutual_choice_gains_little(tmp_path):
    found = trained(tmp_path, 0, "topk, no heavy tail", "mutual, no heavy tail")
    assert found["mutual, no heavy tail"]["fvu"] > 0.93 * found["topk, no heavy tail"]["fvu"]
