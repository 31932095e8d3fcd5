"""What is measured before step 0, against NumPy; samples spread over the text."""

import numpy as np
import pytest
import torch
from rigs.fakes import measured

from sae.base.errors import ConfigError, Stopped
from sae.base.progress import Watch
from sae.coder.normalization import Normalization
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.stream.batch import Block
from sae.training.measuring import Recipe, geometric_median, measure, sample_activations

D = 6


def test_measured_statistics():
    x = torch.randn(4000, D) * 2 + 3
    x[7] *= 1000
    found = measured(x, MaskSpec((1, 2), 1), 10.0, Normalization())
    kept = np.delete(x.double().numpy(), 7, axis=0)
    assert (found.tokens, found.outliers) == (4000, 1)
    assert found.mask == MaskSpec((1, 2), 1, {"x": 10 * found.median_norms["x"]})
    np.testing.assert_allclose(found.center, kept.mean(0), rtol=1e-5)
    assert measured(x, MaskSpec(), 10.0, Normalization(), "zero").center.abs().sum() == 0
    middle = measured(x, MaskSpec(), 10.0, Normalization(), "geometric_median").center
    torch.testing.assert_close(middle, geometric_median(torch.from_numpy(kept)).float(), atol=1e-3, rtol=1e-3)
    assert found.variance == pytest.approx(kept.var(0).sum(), rel=1e-6)
    assert found.input_spread == pytest.approx(kept.var(0).mean() ** 0.5, rel=1e-6)
    scaled = measured(x, MaskSpec(), 10.0, Normalization("scalar"))
    assert (kept * scaled.normalization.scale).__pow__(2).sum(1).mean() == pytest.approx(D, rel=1e-5)
    unfiltered = measured(x, MaskSpec(), 0.0, Normalization())
    assert unfiltered.outliers == 0
    assert unfiltered.variance > 10 * found.variance


def test_statistics_refuse_what_cannot_be_measured():
    with pytest.raises(ConfigError, match="every token is masked"):
        measured(torch.zeros(0, D), MaskSpec(), 10.0, Normalization())
    broken = torch.randn(10, D)
    broken[3, 2] = float("inf")
    with pytest.raises(ConfigError, match="layer 3 holds NaN or Inf at 1 of 10 tokens"):
        measured(broken, MaskSpec(), 10.0, Normalization(), site="layer 3")


def test_geometric_median_has_no_nearer_neighbor_and_shrugs_at_outliers():
    x = torch.randn(501, 4, dtype=torch.float64)
    x[:50] += 1000
    center = geometric_median(x)
    distance = (x - center).norm(dim=1).sum()
    for direction in torch.cat([torch.eye(4), -torch.eye(4)]).double():
        assert (x - center - 1e-3 * direction).norm(dim=1).sum() > distance
    assert center.norm() < 0.5 < x.mean(0).norm()
    assert torch.equal(geometric_median(torch.ones(5, 3)), torch.ones(3))


def test_a_sample_is_spread_over_the_text_and_can_be_stopped():
    class Source:
        def __init__(self):
            self.reads = []

        def __len__(self):
            return 100

        def told(self, blocks):
            return f"blocks {blocks}"

        def read(self, block):
            self.reads.append(block)
            return Block({"x": torch.full((10, 2), float(block))}, {})

    source = Source()
    found = sample_activations(source, 95, Watch())["x"]  # type: ignore[arg-type]
    assert found.shape == (95, 2)
    assert sorted(set(found[:, 0].tolist())) == [10.0 * i for i in range(10)]
    assert len(source.reads) == 10  # none twice
    with pytest.raises(Stopped):
        sample_activations(source, 95, Watch(lambda: True))  # type: ignore[arg-type]


def two_sites(n=3000):
    a, b = torch.randn(n, 4) * 2 + 1, torch.randn(n, 3) * 50 - 7
    return {"a": a, "b": b}, (Site("a"), Site("b"))


def test_several_sites_have_their_own_scale_limit_and_weight():
    activations, sites = two_sites()
    activations["b"][5] *= 1000
    found = measure(activations, sites, sites, MaskSpec(), Recipe(Normalization("scalar")))
    assert found.outliers == 1
    assert found.mask.norm_limits == {name: 10 * median for name, median in found.median_norms.items()}
    assert found.reads == found.writes
    kept = {name: np.delete(x.double().numpy(), 5, axis=0) for name, x in activations.items()}
    variances = []
    for site in found.reads:
        x = kept[site.name] * site.scale
        assert (x**2).sum(1).mean() == pytest.approx(site.width, rel=1e-5)
        variances.append(x.var(0).sum())
        assert site.weight * variances[-1] == pytest.approx(found.writes[0].weight * variances[0], rel=1e-5)
    assert found.variance == pytest.approx(sum(variances), rel=1e-5), "balanced weights leave the total as it is"
    plain = measure(activations, sites, sites, MaskSpec(), Recipe(Normalization("scalar"), balance=False))
    assert [site.weight for site in plain.writes] == [1.0, 1.0]


def test_a_transcoder_is_centered_and_scaled_on_both_sides():
    activations, (a, b) = two_sites()
    found = measure(activations, (a,), (b,), MaskSpec(), Recipe(Normalization("scalar")))
    for site, center in ((found.reads[0], found.input_center), (found.writes[0], found.center)):
        x = activations[site.name].double().numpy() * site.scale
        np.testing.assert_allclose(center, x.mean(0), rtol=1e-4)
        assert (x**2).sum(1).mean() == pytest.approx(site.width, rel=1e-5)
    assert found.variance == pytest.approx(
        (activations["b"].double() * found.writes[0].scale).var(0, correction=0).sum()
    )
