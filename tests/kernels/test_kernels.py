"""Encoding and decoding at a support: the plain way against dense algebra, the fast ways against it, and gradients."""

import pytest
import torch
from rigs import plain_kernels as reference

from sae import kernels
from sae.kernels import dense, segmented


def random_support(n, m, most, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(m, generator=g)[: int(torch.randint(0, most + 1, (), generator=g))] for _ in range(n)]
    offsets = torch.tensor([0, *[len(r) for r in rows]]).cumsum(0)
    return offsets, torch.cat([r.sort().values for r in rows])


def through(way, leaves, offsets, ids):
    """Returns pre-activations, reconstruction and the gradients of y, W_enc, b_enc and W_dec of a small coder."""
    y, w, b, d = (leaf.clone().requires_grad_() for leaf in leaves)
    kept = way.encode_at(y, w, b, offsets, ids)
    out = way.decode(kept.relu(), d, offsets, ids)
    (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
    return kept, out, y.grad, w.grad, b.grad, d.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "most"), [(7, 11, 5), (1, 3, 3), (20, 64, 1), (9, 12, 12), (5, 4, 0)])
def test_every_way_equals_the_plain_one(n, m, most, dtype):
    offsets, ids = random_support(n, m, most)
    leaves = [torch.randn(shape, dtype=dtype) for shape in ((n, 6), (m, 6), (m,), (m, 5))]
    expected = through(reference, leaves, offsets, ids)
    for way in (segmented, dense, kernels):
        for found, right in zip(through(way, leaves, offsets, ids), expected, strict=True):
            torch.testing.assert_close(found, right)


def test_the_plain_way_equals_dense_algebra():
    offsets, ids = random_support(9, 12, 6)
    leaves = [torch.randn(9, 4), torch.randn(12, 4), torch.randn(12), torch.randn(12, 3)]
    y, w, b, d = leaves
    mask = torch.zeros(9, 12)
    for row in range(9):
        mask[row, ids[offsets[row] : offsets[row + 1]]] = 1
    kept, out, *_ = through(reference, leaves, offsets, ids)
    torch.testing.assert_close(kept, (y @ w.T + b)[mask > 0])
    torch.testing.assert_close(out, ((y @ w.T + b).relu() * mask) @ d)


def test_low_precision_products():
    offsets, ids = random_support(9, 12, 6)
    leaves = [torch.randn(shape, dtype=torch.bfloat16) for shape in ((9, 8), (12, 8), (12,), (12, 8))]
    exact = reference.encode_at(*(leaf.double() for leaf in leaves[:3]), offsets, ids)
    for way in (segmented, dense):
        found = way.encode_at(*leaves[:3], offsets, ids).double()
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("way", [segmented, dense])
def test_gradients_equal_finite_differences(way):
    offsets, ids = random_support(5, 8, 4)
    y, w = torch.randn(5, 3).double().requires_grad_(), torch.randn(8, 3).double().requires_grad_()
    b, v = torch.randn(8).double().requires_grad_(), torch.randn(len(ids)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w, b: way.encode_at(y, w, b, offsets, ids), (y, w, b))
    assert torch.autograd.gradcheck(lambda v, w: way.decode(v, w, offsets, ids), (v, w))


@pytest.mark.parametrize("way", [segmented, dense])
def test_given_scores_are_used_where_the_caller_has_them_and_pass_the_same_gradients(way):
    offsets, ids = random_support(6, 10, 5)
    leaves = [torch.randn(6, 4), torch.randn(10, 4), torch.randn(10)]
    known, weights = torch.randn(len(ids)), torch.randn(len(ids))
    grads = []
    for given in (known, None):
        parts = [leaf.clone().requires_grad_() for leaf in leaves]
        kept = way.encode_at(*parts, offsets, ids, given)
        assert given is None or torch.equal(kept, given)
        (kept * weights).sum().backward()
        grads.append([part.grad for part in parts])
    for left, right in zip(*grads, strict=True):
        assert torch.equal(left, right)


def test_the_way_is_chosen_by_how_many_entries_there_are(monkeypatch):
    chosen = []
    for way in (segmented, dense):
        monkeypatch.setattr(way, "decode", lambda *given, way=way: chosen.append(way) or reference.decode(*given))
    for kept in (1, 9):
        offsets, ids = torch.tensor([0, kept]), torch.arange(kept)
        kernels.decode(torch.ones(kept), torch.ones(10, 2), offsets, ids)
    assert chosen == [segmented, dense]
