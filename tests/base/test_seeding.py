"""Randomness by name: the same on every machine, independent of what else is drawn."""

import numpy as np
import torch

from sae.base.seeding import generator, mixed, uniform


def test_a_draw_depends_on_its_key_alone():
    first = torch.randn(5, generator=generator(0, "rows", 3))
    torch.manual_seed(123)
    torch.randn(100)
    assert torch.equal(first, torch.randn(5, generator=generator(0, "rows", 3)))
    others = [generator(1, "rows", 3), generator(0, "rows", 4), generator(0, "row", 3), generator(0, "rows", "3")]
    assert all(not torch.equal(first, torch.randn(5, generator=other)) for other in others)


def test_draws_are_those_of_every_machine():
    assert generator(0, "rows", 3).initial_seed() == 3341452320115232186
    assert uniform("held-out", "a.txt") == 0.8414334950684622
    assert mixed(np.array([1, 2**63], np.uint64)).tolist() == [6238072747940578789, 2720858781877447050]


def test_names_spread_evenly_and_purposes_are_independent():
    a = np.array([uniform("held-out", f"document {i}") for i in range(4000)])
    b = np.array([uniform("order", f"document {i}") for i in range(4000)])
    assert (np.histogram(a, 10, (0, 1))[0] > 300).all()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
