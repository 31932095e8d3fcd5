"""The benchmark of steps: every family of ours makes one, and a step that computes something else is refused."""

import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.speed.__main__ import FAMILIES, ours
from tests.benchmarks.speed.checking import agreement
from tests.benchmarks.speed.contestants import Shape, write_tensors

sys.path.append(str(Path(__file__).parent / "speed"))  # where processes of their own find them

from step_ours import Ours
from worker import Session

SHAPE = Shape(d=16, latents=64, k=4, tokens=128)
SIZES = {"k": SHAPE.k, "tokens": SHAPE.tokens, "lr": 1e-3, "dead_after": 10**9}


@pytest.fixture
def data(tmp_path):
    write_tensors(SHAPE, tmp_path / "data.safetensors")
    return tmp_path / "data.safetensors"


def first_step(data: Path, name: str, **changes) -> tuple[Path, float]:
    options = {"data": str(data), "threads": torch.get_num_threads(), **SIZES, **ours(SHAPE).options, **changes}
    session = Session(Ours, options)
    loss, path = session.step()["loss"], data.with_name(name)
    session.gradients(str(path))
    return path, loss


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_is_made(data, family):
    options = ours(SHAPE, family=family).options
    _, loss = first_step(data, family, **options)
    assert loss > 0


def test_a_step_that_computes_something_else_is_seen(data):
    (mine, loss), (same, again), (more, other) = (
        first_step(data, name, **changes) for name, changes in (("a", {}), ("b", {}), ("c", {"k": SHAPE.k + 1}))
    )
    assert agreement(mine, same, data, (loss, again)).holds
    told = agreement(mine, more, data, (loss, other))
    assert not told.holds
    assert told.loss > 1e-3
    assert told.ties > 4
