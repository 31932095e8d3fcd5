"""What ranks exchange: how often in a step, by rule, as the page says; sums without a second copy of what is large."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rigs.sharing import Case, cases, trained
from torch import Tensor

import sae.parallel
from sae.parallel import collectives
from sae.selection import trainable

MOVING = ("all_reduce", "all_gather", "broadcast", "reduce", "gather", "scatter", "all_to_all", "barrier")
MOVING += ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_gather_object")
PAGE = (Path(sae.parallel.__file__).parent / "README.md").read_text(encoding="utf-8")
TOLD = {
    rule: int(count)
    for rules, count in re.findall(r"^\| ([\w, ]+) \| (\d+) \|", PAGE, re.M)
    for rule in rules.split(", ")
}
READS = ("tolist", "item", "__float__", "__int__", "__bool__")
STEPS = 4


@pytest.fixture
def moved(monkeypatch):
    """A group of one rank, and the tensors that each collective was given."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    calls: list[tuple[str, object]] = []
    for name in MOVING:
        original = getattr(dist, name)
        monkeypatch.setattr(
            dist, name, lambda *a, _name=name, _call=original, **k: (calls.append((_name, a)), _call(*a, **k))[1]
        )
    yield calls
    dist.destroy_process_group()


def test_the_page_tells_of_every_rule():
    assert TOLD.keys() == trainable().keys()


@pytest.mark.parametrize("name", [*(f"rule {rule}" for rule in trainable()), "cross-layer topk"])
def test_a_step_takes_as_many_collectives_as_the_page_says(moved, name):
    case: Case = cases()[name]
    trained(case, STEPS, torch.float32)
    assert len(moved) == STEPS * TOLD[case.rule]


def test_the_host_waits_once_in_a_step(moved, monkeypatch):
    """For the numbers of tokens of all ranks; what is read of a trainer's state at the end is the same at any step."""
    places = []
    for name in READS:
        original = getattr(Tensor, name)

        def read(self, *args, _original=original):
            file = sys._getframe(1).f_code.co_filename
            places.extend([file] * file.endswith(("trainer.py", "choosing.py", "collectives.py")))
            return _original(self, *args)

        monkeypatch.setattr(Tensor, name, read)
    trained(cases()["rule topk"], STEPS, torch.float32)
    few = len(places)
    trained(cases()["rule topk"], 3 * STEPS, torch.float32)
    assert len(places) - few == few + 2 * STEPS, places


def test_sums_of_what_is_large_are_taken_where_it_lies(moved, monkeypatch):
    monkeypatch.setattr(collectives, "BUCKET_BYTES", 64)
    sizes = [3, 100, 7, 9, 16, 1, 40]
    tensors = [torch.full((size,), float(i)) for i, size in enumerate(sizes)] + [torch.ones(5, dtype=torch.int64)]
    before = [tensor.clone() for tensor in tensors]
    collectives.total_(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "the sum of one"
    given = [args[0] for _, args in moved]
    large = [tensor.data_ptr() for tensor in tensors if tensor.nbytes >= 64]
    assert [x.data_ptr() for x in given if x.data_ptr() in large] == large
    assert all(x.nbytes <= 64 for x in given if x.data_ptr() not in large), "one bucket is all that is copied"
    assert sum(x.numel() for x in given) == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_columns_come_back_as_they_were(moved, dtype, n):
    columns = (torch.arange(n), torch.arange(n) * 2**27, torch.randn(n, dtype=dtype))
    found = collectives.gathered(*columns)
    assert len(moved) == 2
    for got, own in zip(found, columns, strict=True):
        assert torch.equal(got, own)
        assert got.dtype == own.dtype
