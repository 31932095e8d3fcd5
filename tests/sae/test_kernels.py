"""The sparse products: the fast path against the plain one; gradients against autograd and finite differences."""

import pytest
import torch

from sae import kernels
from sae.kernels import dense, reference, segmented


def random_support(n, m, most, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(m, generator=g)[: int(torch.randint(0, most + 1, (), generator=g))] for _ in range(n)]
    offsets = torch.tensor([0, *[len(r) for r in rows]]).cumsum(0)
    return offsets, torch.cat([r.sort().values for r in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "most"), [(7, 11, 5), (1, 3, 3), (20, 64, 1), (5, 4, 0)])
def test_fast_products_equal_the_plain_ones(n, m, most, dtype):
    offsets, ids = random_support(n, m, most)
    values = torch.randn(len(ids), dtype=dtype)
    a, w = torch.randn(n, 6, dtype=dtype), torch.randn(m, 6, dtype=dtype)
    for fast in (segmented, dense):
        torch.testing.assert_close(fast.spmm(offsets, ids, values, w), reference.spmm(offsets, ids, values, w))
        torch.testing.assert_close(fast.sddmm(offsets, ids, a, w), reference.sddmm(offsets, ids, a, w))


def test_low_precision_products():
    offsets, ids = random_support(9, 12, 6)
    a, w = torch.randn(9, 8, dtype=torch.bfloat16), torch.randn(12, 8, dtype=torch.bfloat16)
    exact = reference.sddmm(offsets, ids, a.double(), w.double())
    torch.testing.assert_close(segmented.sddmm(offsets, ids, a, w).double(), exact, rtol=2e-2, atol=5e-2)


def test_transpose_is_the_transposed_matrix():
    offsets, ids = random_support(9, 12, 6)
    values = torch.randn(len(ids))
    dense = torch.zeros(9, 12).index_put((torch.repeat_interleave(torch.arange(9), offsets.diff()), ids), values)
    by_column, rows, order = kernels.transpose(offsets, ids, 12)
    torch.testing.assert_close(reference.spmm(by_column, rows, values[order], torch.eye(9)), dense.T)


def test_gradients_equal_finite_differences():
    offsets, ids = random_support(5, 8, 4)
    y, w = torch.randn(5, 3).double().requires_grad_(), torch.randn(8, 3).double().requires_grad_()
    b, v = torch.randn(8).double().requires_grad_(), torch.randn(len(ids)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w, b: kernels.encode_at(y, w, b, offsets, ids), (y, w, b))
    assert torch.autograd.gradcheck(lambda v, w: kernels.decode(v, w, offsets, ids), (v, w))


def test_gradients_equal_dense_autograd():
    offsets, ids = random_support(6, 10, 5)
    tokens = torch.repeat_interleave(torch.arange(6), offsets.diff())
    leaves = [torch.randn(6, 4), torch.randn(10, 4), torch.randn(10), torch.randn(10, 4)]
    ours, dense = ([x.clone().double().requires_grad_() for x in leaves] for _ in range(2))
    y, w, b, d = ours
    kernels.decode(kernels.encode_at(y, w, b, offsets, ids).relu(), d, offsets, ids).square().sum().backward()
    y, w, b, d = dense
    mask = torch.zeros(6, 10).double().index_put((tokens, ids), torch.ones(len(ids)).double())
    (((y @ w.T + b) * mask).relu() @ d).square().sum().backward()
    for left, right in zip(ours, dense, strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_given_scores_are_used_where_the_caller_has_them():
    offsets, ids = random_support(6, 10, 5)
    y, w, b = torch.randn(6, 4), torch.randn(10, 4), torch.randn(10)
    known = torch.randn(len(ids))
    assert torch.equal(kernels.encode_at(y, w, b, offsets, ids, known), known)
