"""Normalization: what each kind does, and that it is undone."""

import pytest
import torch

from sae.base.errors import ConfigError
from sae.coder.normalization import KINDS, Normalization, undo


@pytest.mark.parametrize("kind", KINDS)
def test_undoing_gives_back_the_input(kind):
    x = torch.randn(20, 7, dtype=torch.float64) * 5 + 3
    y, how = Normalization(kind, 0.3).apply(x)
    torch.testing.assert_close(undo(y, how), x)


def test_what_each_kind_does():
    x = torch.randn(20, 7, dtype=torch.float64) * 5 + 3
    assert torch.equal(Normalization("none").apply(x)[0], x)
    assert torch.equal(Normalization("scalar", 0.25).apply(x)[0], x * 0.25)
    for unbiased in (True, False):
        y = Normalization("layer_norm", eps=0.0, unbiased=unbiased).apply(x)[0]
        torch.testing.assert_close(y.mean(1), torch.zeros(20).double())
        torch.testing.assert_close(y.std(1, correction=int(unbiased)), torch.ones(20).double())
    torch.testing.assert_close(Normalization("l2", eps=0.0).apply(x)[0].norm(dim=1), torch.full((20,), 7**0.5).double())


@pytest.mark.parametrize("kind", ["layer_norm", "l2"])
def test_a_constant_or_zero_row_is_finite(kind):
    y, how = Normalization(kind).apply(torch.zeros(2, 5))
    assert torch.equal(y, torch.zeros(2, 5))
    assert torch.equal(undo(y, how), torch.zeros(2, 5))


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match=r"f\.kind: 'l3' is not one of .* Did you mean 'l2'"):
        Normalization("l3").validate("f")
    with pytest.raises(ConfigError, match=r"f\.scale: 0\.0 must be positive"):
        Normalization("scalar", 0.0).validate("f")


def test_center_takes_out_the_mean_of_each_token_and_puts_it_back():
    x = torch.randn(20, 7) + 3
    y, how = Normalization("center").apply(x)
    torch.testing.assert_close(y, x - x.mean(1, keepdim=True))
    torch.testing.assert_close(undo(y, how), x)


@pytest.mark.parametrize("kind", ["layer_norm", "l2"])
def test_eps_is_undone_or_not_as_the_coder_was_trained(kind):
    x = torch.randn(20, 7).double()
    y, how = Normalization(kind, eps=0.5).apply(x)
    torch.testing.assert_close(undo(y, how), x)
    same, without = Normalization(kind, eps=0.5, undo_eps=False).apply(x)
    assert torch.equal(same, y)
    shift = x.mean(1, keepdim=True) if kind == "layer_norm" else torch.zeros(20, 1).double()
    size = x.std(1, keepdim=True) if kind == "layer_norm" else x.norm(dim=1, keepdim=True) / 7**0.5
    torch.testing.assert_close(undo(y, without), (x - shift) / (size + 0.5) * size + shift)


@pytest.mark.parametrize("kind", ["layer_norm", "l2", "center"])
def test_a_zero_vector_stays_one_even_without_eps(kind):
    y, how = Normalization(kind, eps=0.0).apply(torch.zeros(2, 7))
    assert torch.equal(y, torch.zeros(2, 7))
    assert torch.equal(undo(y, how), torch.zeros(2, 7))
