"""Which ranks train what: meshes that cannot be are refused in one line, and coders are dealt by what they take."""

import pytest
from rigs.fakes import tiny_config

from sae.base.errors import ConfigError
from sae.lm.site import Site
from sae.parallel.mesh import Shape
from sae.selection.topk import TopK
from sae.training.config import CoderConfig
from sae.training.dealing import dealt, shape_for
from sae.training.optim import OptimConfig
from sae.training.planning import CoderPlan


def plans(*widths):
    site = (Site("a", width=8),)
    return [
        CoderPlan(f"{i}", site, site, CoderConfig(width, selection=TopK(2)), OptimConfig())
        for i, width in enumerate(widths)
    ]


@pytest.mark.parametrize(
    ("changes", "n", "told"),
    [
        ({"parallel.sites": 3}, 4, r"parallel: sites 3 x latents 1 = 3 does not divide 4 ranks; start a multiple of 3"),
        ({"parallel.latents": -1}, 1, r"parallel\.latents: -1 must be at least 1, or 0"),
        ({"parallel.sites": 2, "activations.lanes": 2}, 4, r"activations\.lanes: 2 for 4 ranks"),
    ],
)
def test_what_is_no_mesh_is_refused(tmp_path, changes, n, told):
    def asked():
        config = tiny_config(tmp_path, tmp_path, changes)
        config.validate()
        shape_for(config, n)

    with pytest.raises(ConfigError, match=told):
        asked()


def test_what_cannot_be_cut_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, tmp_path, {"parallel.latents": 2})
    assert shape_for(config, 4) == Shape(1, 2, 2)
    monkeypatch.setattr(TopK, "unit", lambda self, m: None)
    with pytest.raises(ConfigError, match=r"parallel\.latents: selection topk cannot choose over several ranks; set"):
        shape_for(config, 4)
    monkeypatch.undo()
    monkeypatch.setattr(type(config.coder.objectives["auxk"]), "of_latents", None)
    with pytest.raises(ConfigError, match=r"parallel\.latents: it is not known how objective auxk adds up"):
        shape_for(config, 4)


def test_the_largest_coder_is_dealt_first_and_each_to_the_least_loaded(tmp_path):
    config = tiny_config(tmp_path, tmp_path)
    assert dealt(config, [], plans(16, 64, 32, 16, 16), Shape(2)) == [1, 0, 1, 1, 0]
    assert dealt(config, [], plans(8, 8, 8), Shape(3)) == [0, 1, 2]
    assert dealt(config, [], plans(8, 8), Shape(1, 2)) == [0, 0]
    with pytest.raises(ConfigError, match=r"parallel\.sites: 3 groups of ranks for 2 coders, .* set it to 2 or less"):
        dealt(config, [], plans(8, 8), Shape(3))
