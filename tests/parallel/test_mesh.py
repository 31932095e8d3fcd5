"""Meshes of ranks: what moves tensors between them must be able to."""

import pytest
import torch.distributed as dist
from rigs.teams import together

from sae.base.errors import ConfigError
from sae.parallel.mesh import Shape, check_exchange
from sae.parallel.ranks import Axis


def test_a_backend_without_all_to_all_is_refused_in_one_line():
    with pytest.raises(
        ConfigError, match=r"^parallel\.sites: 2 groups exchange .*; join them by gloo or nccl, or set it to 1$"
    ):
        check_exchange(Axis(0, 2, dist.ProcessGroup(0, 2)), "cpu")  # type: ignore[attr-defined]


def test_one_that_has_it_is_taken():
    assert together(Shape(sites=2), lambda mesh: check_exchange(mesh.sites, "cpu")) == [None, None]
