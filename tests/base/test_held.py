"""Bytes held at once by a computation: what has gone is not counted, whenever it is looked for."""

import torch

from sae.base.held import Live
from sae.base.memory import LARGEST


def test_the_worst_moment_is_found_among_tensors_that_come_and_go():
    outer = torch.zeros(1000)
    with Live() as live:
        a = outer + 1  # 4,000 bytes
        b = torch.cat([a, a, a])  # 12,000 beside it: the worst
        view, same = b[:10], a.mul_(2)  # nothing of their own
        del a, b, same
        c = view.new_zeros(900)  # b is there as long as its view is
        del view
        d = c * 2
        assert live.worst.total == 16_000
        e = torch.zeros(2000)
        assert live.worst.total == 16_000  # 3,600 + 3,600 + 8,000
        f = d.sum() + e
    assert f.shape == (2000,)
    assert live.worst.total == 3600 + 3600 + 8000 + 8000 + 4


def test_what_is_kept_for_a_gradient_is_held_until_it_is_used():
    x = torch.ones(1000, requires_grad=True)
    with Live() as live:
        y = x
        for _ in range(10):
            y = y.exp()  # keeps what it made
        assert live.worst.total == 40_000
        y.sum().backward()
    assert live.worst.total == 40_000 + 4 + 4 + 4000 + 4000  # sums, what comes back and what is made of it
    assert x.grad is not None


def test_large_blocks_are_returned_and_small_ones_kept():
    with Live() as live:
        held = torch.empty(LARGEST, dtype=torch.uint8), torch.empty(LARGEST - 1, dtype=torch.uint8)
    assert (live.worst.kept, live.worst.returned) == (LARGEST - 1, LARGEST) == tuple(map(len, reversed(held)))
