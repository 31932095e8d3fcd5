"""The best mesh of so many ranks fits, shares the work evenly and moves least, and the reason says so."""

from dataclasses import replace

import pytest
from rigs.fakes import tiny_config

from sae.base.errors import ConfigError
from sae.lm.site import Site
from sae.parallel.mesh import ParallelConfig, Shape
from sae.selection.topk import TopK
from sae.training import shaping
from sae.training.config import CoderConfig
from sae.training.footprint import Passes, footprint
from sae.training.optim import OptimConfig
from sae.training.planning import CoderPlan
from sae.training.shaping import Deal, Planned, deal, mesh_of_run, work
from sae.training.traffic import traffic

OPEN, RULE = ParallelConfig(0, 0), TopK(4)


def plan(name, d_sae, width=64, site="a"):
    read = (Site(site, width=width),)
    return CoderPlan(name, read, read, CoderConfig(d_sae, selection=RULE), OptimConfig())


def planned(*plans):
    return Planned(Passes([]), {name: s.width for one in plans for name, s in one.sites.items()}, list(plans))


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Returns (plans, ranks, bytes of a rank, parallel) -> the mesh, the reason, and the config."""
    monkeypatch.setattr(shaping, "process_bytes", lambda: 0)

    def run(plans, n, room=10**12, parallel=OPEN):
        monkeypatch.setattr(shaping, "memory_of_rank", lambda device, spread: room)
        config = replace(tiny_config(tmp_path, tmp_path, {"activations.lanes": 64}), parallel=parallel)
        made = deal(config, planned(*plans), n)
        return made.shape, made.reason, config

    return run


def test_alike_coders_are_dealt_to_groups_which_move_no_gradients(found):
    plans = [plan(f"{i}", 4096, site=f"s{i}") for i in range(4)]
    shape, reason, config = found(plans, 4)
    assert shape == Shape(sites=4)
    moved = [traffic(config, plans, *each).received[1] for each in ((Shape(sites=4), [0, 1, 2, 3]), (Shape(data=4),))]
    assert moved[0] < moved[1] / 10
    assert reason.startswith("of 6 meshes 6 fit the 1 TB of a rank, 6 share work evenly; of these it moves least, ")
    assert " (data alone " in reason


def test_groups_of_which_one_has_more_to_do_are_not_taken(found):
    shape, reason, _ = found([plan("large", 8192), plan("small", 512, site="b")], 2)
    assert shape.sites == 1
    assert "of 3 meshes 3 fit the 1 TB of a rank, 2 share work evenly" in reason


def test_what_does_not_fit_is_cut(found):
    one = [plan("large", 2**16)]
    alone, _, config = found(one, 4)
    held = [footprint(config, Passes([]), one, shape, [0]).peak(measures=True) for shape in (alone, Shape(latents=4))]
    shape, reason, _ = found(one, 4, room=held[1])
    assert shape == Shape(latents=4)
    assert " 1 fit the " in reason
    shape, reason, _ = found(one, 4, room=1000)
    assert shape == Shape(latents=4)
    assert reason == "none of 3 meshes fits the 1 kB of a rank; this one takes least"


def test_what_is_named_stays_and_what_cannot_be_cut_is_whole(found):
    plans = [plan(f"{i}", 4096, site=f"s{i}") for i in range(4)]
    assert found(plans, 8, parallel=ParallelConfig(0, 4))[0].latents == 4
    assert found(plans, 8, parallel=ParallelConfig(2, 0))[0].sites == 2
    assert found(plans, 8, parallel=ParallelConfig(2, 2))[:2] == (Shape(2, 2, 2), "")
    with pytest.raises(ConfigError, match=r"parallel: sites 3 x latents 1 = 3 does not divide 4 ranks"):
        found(plans, 4, parallel=ParallelConfig(3, 0))
    with pytest.raises(ConfigError, match=r"parallel\.sites: 8 groups of ranks for 4 coders"):
        found(plans, 8, parallel=ParallelConfig(8, 0))


def test_an_estimate_knows_nothing_of_what_is_passed(tmp_path):
    config = replace(tiny_config(tmp_path, tmp_path), parallel=OPEN)
    with pytest.raises(ConfigError, match=r"^parallel\.sites: 0 leaves the choice to an estimate, .*; name a number"):
        mesh_of_run(config, 4, passed=True)
    assert mesh_of_run(config, 1, passed=True) == (Shape(), "")  # the only one


def test_of_a_model_that_cannot_be_traced_there_is_no_estimate(tmp_path, monkeypatch):
    def untraceable(*given):
        raise RuntimeError("no shape\nis known")

    monkeypatch.setattr(shaping, "planned", untraceable)
    config = replace(tiny_config(tmp_path, tmp_path), parallel=ParallelConfig(1, 0))
    with pytest.raises(ConfigError, match=r"^parallel\.latents: 0 .*, and there is none \(no shape is known\); name a"):
        mesh_of_run(config, 4)


def test_the_busiest_rank_has_whole_lanes_and_whole_latents(tmp_path):
    config = tiny_config(tmp_path, tmp_path, {"activations.lanes": 64, "batch_tokens": 128})
    one = plan("coder", 1000)

    def share(shape):
        return work(config, planned(one), Deal(shape, [0])) / work(config, planned(one), Deal(Shape(), [0]))

    assert share(Shape(data=4)) == 1 / 4
    assert share(Shape(data=48)) == 2 / 64
    assert share(Shape(latents=3)) == pytest.approx(334 / 1000)
    assert share(Shape(data=48, latents=3)) == pytest.approx(2 / 64 * 334 / 1000)


def test_ranks_along_latents_all_run_the_model_of_a_loss_on_it(tiny_model, tiny_text):
    config = tiny_config(tiny_model, tiny_text, {"coder.objectives": {"kl": {"type": "kl", "weight": 1.0}}})
    found = shaping.planned(config)
    alone, data, latents = (
        work(config, found, Deal(shape, [0])) for shape in (Shape(), Shape(data=2), Shape(latents=2))
    )
    assert data == pytest.approx(alone / 2)
    assert latents > 0.8 * alone
