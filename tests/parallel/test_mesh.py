"""Meshes of ranks: what moves tensors between them must be able to."""

import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
from rigs.children import Child, ranks
from rigs.teams import together

from sae.base.errors import ConfigError
from sae.parallel.mesh import Shape, check_exchange, made
from sae.parallel.ranks import Axis, process_group, rank


def test_a_backend_without_all_to_all_is_refused_in_one_line():
    with pytest.raises(
        ConfigError, match=r"^parallel\.sites: 2 groups exchange .*; join them by gloo or nccl, or set it to 1$"
    ):
        check_exchange(Axis(0, 2, dist.ProcessGroup(0, 2)), "cpu")  # type: ignore[attr-defined]


def test_one_that_has_it_is_taken():
    assert together(Shape(sites=2), lambda mesh: check_exchange(mesh.sites, "cpu")) == [None, None]


def timeouts(folder):
    """The work of a rank: leaves how long its groups wait for a collective."""
    with process_group():
        mesh = made(Shape(2, 1, 2))
        groups = [dist.group.WORLD, mesh.sites.group, mesh.latents.group, mesh.team.group]
        found = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
        (folder / f"{rank()}.json").write_text(json.dumps(found))
    return 0


@pytest.mark.slow
def test_all_groups_wait_as_long_as_that_of_all_ranks(tmp_path):
    children = [Child(tmp_path / f"{i}.txt", partial(timeouts, tmp_path), env) for i, env in enumerate(ranks(4))]
    assert [child.wait() for child in children] == [0] * 4, children[0].output
    for i in range(4):
        assert json.loads((tmp_path / f"{i}.json").read_text()) == [24 * 3600] * 4
