"""The shifted Zipf curve: fits that recover it, and budgets that are exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.base.zipf import Zipf, budgets, fit, ranked


@pytest.mark.parametrize(("s", "q"), [(1.0, 3.0), (0.7, 0.0), (2.0, 20.0), (1.3, 100.0)])
def test_a_fit_recovers_the_curve(s, q):
    density = Zipf(s, q).shares(2000) * 32
    found = fit(density[torch.randperm(2000)])
    assert found.r2 > 0.999
    body = slice(0, 1800)
    error = (found.shares(2000)[body].log() - Zipf(s, q).shares(2000)[body].log()).abs().max()
    assert error < 0.15, (found, float(error))


def test_the_low_end_does_not_bend_the_fit():
    density = Zipf(1.0, 3.0).shares(1000)
    density[900:] = 0
    assert fit(density).exponent == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("density", [[], [0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.5, 0.0, 0.0]])
def test_densities_that_do_not_fall_give_a_flat_curve(density):
    found = fit(torch.tensor(density, dtype=torch.float64)) if density else fit(torch.zeros(1).double())
    assert (found.exponent, found.shift) == (0.0, 0.0)
    torch.testing.assert_close(found.shares(5), torch.full((5,), 0.2).double())


@given(st.floats(0, 4), st.floats(0, 500), st.integers(1, 300), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_budgets_sum_to_the_total_within_their_bounds(s, q, m, share):
    most = 37
    for least in (0, 1):
        total = round(least * m + share * (most - least) * m)
        found = budgets(Zipf(s, q).shares(m) * total, total, most, least)
        assert int(found.sum()) == total
        assert int(found.min()) >= least
        assert int(found.max()) <= most
        assert (found.diff() <= 0).all(), "who wants more gets no less"


def test_whole_wishes_within_the_bounds_are_granted():
    wanted = torch.tensor([5.0, 3, 1, 1])
    assert budgets(wanted, 10, 9, 1).tolist() == [5, 3, 1, 1]
    assert budgets(torch.tensor([9.0, 1, 0, 0]), 10, 4, 1).tolist() == [4, 4, 1, 1], (
        "what is cut off is shared in proportion"
    )


def test_ranks_follow_density_with_ties_to_the_lower_id():
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert ranked(shares, torch.tensor([1.0, 7.0, 3.0])).tolist() == [0.2, 0.5, 0.3]
    assert ranked(shares, torch.zeros(3)).tolist() == [0.5, 0.3, 0.2]
