"""Every metric against its definition written out in NumPy, whatever the batches."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from sae.evaluation.metrics import Moments, Reconstruction, fvu, kl_divergence, loss_recovered
from sae.kernels.codes import SparseLatents, by_rows

N, D, WIDTH, K = 60, 6, 12, 3


def data():
    x = torch.randn(N, D) * torch.linspace(0.5, 3, D) + 2
    out = x + torch.randn(N, D) * 0.4
    ids = torch.stack([torch.randperm(WIDTH - 2)[:K] for _ in range(N)])  # the last two latents never fire
    return x, out, SparseLatents(*by_rows(ids), torch.rand(N * K).where(torch.rand(N * K) > 0.3, 0.0), WIDTH)


def gathered(x, out, latents, size):
    found = Reconstruction(WIDTH, D)
    for start in range(0, N, size):
        rows = slice(start, min(start + size, N))
        a, b = latents.offsets[rows.start], latents.offsets[rows.stop]
        offsets = latents.offsets[rows.start : rows.stop + 1] - a
        found.update(x[rows], out[rows], SparseLatents(offsets, latents.ids[a:b], latents.values[a:b], WIDTH))
    return found


@pytest.mark.parametrize("size", [1, 7, N])
def test_reconstruction_equals_the_definitions(size):
    x, out, latents = data()
    found, density = gathered(x, out, latents, size).result(), gathered(x, out, latents, size).density()
    t, o, z = x.double().numpy(), out.double().numpy(), latents.to_dense().double().numpy()
    error = t - o
    fvu_ = (error**2).sum() / ((t - t.mean(0)) ** 2).sum()
    nmse = (error**2).sum(1) / (t**2).sum(1)
    norms = np.linalg.norm(t, axis=1), np.linalg.norm(o, axis=1)
    expected = {
        "tokens": N,
        "fvu": fvu_,
        "ev": 1 - fvu_,
        "mse": (error**2).sum(1).mean(),
        "nmse_mean": nmse.mean(),
        "nmse_median": np.sort(nmse)[(N - 1) // 2],
        "l0": (z != 0).sum(1).mean(),
        "cosine": ((t * o).sum(1) / (norms[0] * norms[1])).mean(),
        "norm_ratio": (norms[1] / norms[0]).mean(),
        "reconstruction_bias": (o**2).sum() / (t * o).sum(),
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["fvu"] == pytest.approx(fvu(x, out), rel=1e-12)
    share = (z != 0).mean(0)
    assert density["dead_share"] == (share == 0).mean() >= 2 / WIDTH
    assert density["counted_over_tokens"] == N
    edges = density["log10_density_edges"]
    assert density["log10_density_counts"] == np.histogram(np.log10(share[share > 0]), edges)[0].tolist()
    assert density["dense_share_10_percent"] == pytest.approx((share > 0.1).mean())
    assert density["dense_share_1_percent"] == pytest.approx((share > 0.01).mean())


def test_extremes_have_their_known_values():
    x, _, latents = data()
    perfect = gathered(x, x, latents, N).result()
    assert (perfect["fvu"], perfect["nmse_mean"], perfect["mse"]) == (0, 0, 0)
    assert (perfect["cosine"], perfect["norm_ratio"], perfect["reconstruction_bias"]) == pytest.approx((1, 1, 1))
    mean = gathered(x, x.double().mean(0).expand(N, D), latents, 7).result()
    assert mean["fvu"] == pytest.approx(1, abs=1e-9)  # predicting the mean explains nothing
    shrunk = gathered(x, x / 2, latents, N).result()
    assert (shrunk["reconstruction_bias"], shrunk["norm_ratio"]) == pytest.approx((0.5, 0.5))
    silent = gathered(x, torch.zeros(N, D), latents.with_values(torch.zeros(N * K)), N)
    assert silent.result()["nmse_mean"] == 1
    assert silent.result()["l0"] == 0
    assert silent.result()["reconstruction_bias"] is None
    assert silent.density()["dead_share"] == 1


def test_no_ratio_where_there_is_nothing_to_explain():
    constant = torch.ones(N, D)
    assert gathered(constant, constant + 1, data()[2], 7).result()["fvu"] is None
    assert loss_recovered(2.0, 2.5, 2.0) is None


def test_moments_of_large_offsets_keep_their_variance():
    x = torch.randn(1000, D) + 1e4  # in float32 the variance would drown
    moments = Moments(D)
    for part in x.split(13):
        moments.update(part)
    assert moments.variance == pytest.approx(x.double().numpy().var(0).sum(), rel=1e-5)
    np.testing.assert_allclose(moments.mean, x.double().numpy().mean(0), rtol=1e-12)


def test_kl_divergence_against_scipy():
    clean, patched = torch.randn(2, 5, 9) * 3, torch.randn(2, 5, 9) * 3
    keep = torch.rand(2, 4) > 0.4
    p, q = (np.exp(log_softmax(x[:, :-1].double().numpy(), -1))[keep.numpy()] for x in (clean, patched))
    found = kl_divergence(clean, patched, keep)
    np.testing.assert_allclose(found, rel_entr(p, q).sum(-1), rtol=2e-5, atol=1e-6)
    assert (found > 0).all()
    assert float(kl_divergence(clean, clean, keep).abs().max()) == 0


def test_recovered_is_one_for_no_harm_and_zero_for_ablation():
    assert loss_recovered(2.0, 2.0, 8.0) == 1
    assert loss_recovered(2.0, 8.0, 8.0) == 0
    assert loss_recovered(2.0, 11.0, 8.0) == -0.5
