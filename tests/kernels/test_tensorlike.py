"""Sparse codes against the dense tensor that they stand for: every answer is the dense one, or a TypeError."""

import operator
from contextlib import suppress

import numpy as np
import pytest
import torch

from sae.kernels.codes import SparseLatents

D = 12
SHAPES = [(), (5,), (2, 5), (2, 0), (3, 1, 2)]


def dense_codes(*leading, seed=0, share=0.4):
    """Numbers of both signs, most of them 0; some rows are full and some are empty."""
    g = torch.Generator().manual_seed(seed)
    found = torch.randn(*leading, D, generator=g) * (torch.rand(*leading, D, generator=g) < share)
    if leading == (2, 5):
        found[0, 1], found[1, 2] = -torch.rand(D, generator=g) - 0.1, 0
    return found


def codes(*leading, **how):
    return SparseLatents.from_dense(dense_codes(*leading, **how))


def same(found, right):
    """The same numbers, of the same type; sparse codes as they are densely."""
    found = found.to_dense() if isinstance(found, SparseLatents) else found
    torch.testing.assert_close(found, right, equal_nan=True)  # to rounding: sums have another order


@pytest.mark.parametrize("leading", SHAPES, ids=str)
def test_attributes_are_those_of_the_dense_tensor(leading):
    dense, z = dense_codes(*leading), codes(*leading)
    same(z, dense)
    for name in ("shape", "ndim", "dtype", "device"):
        assert getattr(z, name) == getattr(dense, name)
    assert (z.size(), z.size(-1), z.dim(), len(z)) == (dense.size(), D, dense.dim(), len(dense))
    assert z.n_tokens == dense[..., 0].numel()
    for made in (np.asarray(z), z.numpy()):
        np.testing.assert_array_equal(made, dense)
    same(torch.as_tensor(z), dense)
    same(torch.tensor(z), dense)
    same(z.to_sparse().to_dense(), dense)
    assert np.asarray(z, dtype="f8").dtype == np.float64
    for one, right in ((z, np.float32), (z.to(torch.float16), np.float16), (z > 0, np.bool_)):
        assert (one.numpy().dtype, np.asarray(one).dtype) == (right, right)


MASK = dense_codes(2, 5, seed=1)[..., 0] > 0
KEYS = [0, -1, 1, slice(None), slice(1, None), slice(0, 2, 2), ..., None, (0, 3), (1, slice(2, 5)), (slice(None), 3)]
KEYS += [(..., 7), (..., -1), (..., slice(2, 9, 3)), (..., [3, 0, 7]), (0, 3, 7), (0, 3, slice(4)), (1, ..., 4)]
KEYS += [(slice(None), slice(None), 2), [1, 0, 1], torch.tensor([1, 0]), np.array([0, 1]), MASK, MASK.numpy()]
KEYS += [([0, 1], [4, 2]), ([0, 1], [4, 2], 3), (MASK, 5), (MASK, slice(2, 4)), torch.tensor(1), np.int64(1), []]
KEYS += [(None, 0), (0, ..., None, slice(None)), (0, slice(None), torch.arange(D) > 6), (slice(None), [4, 4, 0]), True]
KEYS += [
    (slice(None), slice(3, 3)),
    (..., torch.tensor(3)),
    torch.tensor([[0, 1], [1, 0]]),
    (torch.tensor([[0], [1]]), [1, 2]),
]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: str(key).replace("\n", ""))
def test_every_index_is_that_of_the_dense_tensor(key):
    found, right = codes(2, 5)[key], dense_codes(2, 5)[key]
    same(found, right)


def test_codes_are_iterated_like_a_tensor():
    z, dense = codes(2, 5), dense_codes(2, 5)
    assert len(list(z)) == 2
    for one, right in zip(z, dense, strict=True):
        same(one, right)
        assert [float(x) for x in one[0]] == right[0].tolist()


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (2, IndexError, "out of (range|bounds)"),
        ((0, 0, 0, 0), IndexError, "4 indices for the 3 dimensions"),
        ((..., 0, ...), IndexError, "one ellipsis"),
        ((..., D), IndexError, "out of (range|bounds)"),
        ((0, [0, 1], [0, 1]), TypeError, "index z.to_dense()"),
        (dense_codes(2, 5) > 0, TypeError, "index z.to_dense()"),
        ((..., [1, 1]), TypeError, "give each once"),
        (codes(2, 5) > 0, TypeError, r"z \* \(z > 1\)"),
        ("latents", TypeError, "str"),
    ],
    ids=str,
)
def test_an_index_that_codes_cannot_take_is_told(key, error, message):
    with pytest.raises(error, match=message):
        codes(2, 5)[key]


DRAWN = [0.1 + torch.rand(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((D,), (5, 1), (2, 5, D))]
OPERANDS = [2, 0.5, -1.5, 0, torch.tensor(0.3), np.float32(0.25), *DRAWN, -DRAWN[0], torch.zeros(D)]
OPERANDS += [np.linspace(0.1, 1, D, dtype="f4")]
OPERANDS += [float("nan"), float("inf"), torch.arange(D)]
OPS = ["mul", "add", "sub", "truediv", "pow", "lt", "le", "gt", "ge", "eq", "ne"]


def outcome(op, a, b):
    """Returns op(a, b), or None where it would be dense, which is said."""
    with suppress(TypeError):
        return op(a, b)
    with pytest.raises(TypeError, match=r"the result would be dense.*z\.to_dense\(\)"):
        op(a, b)
    return None


@pytest.mark.parametrize("turned", [False, True], ids=["z first", "z last"])
@pytest.mark.parametrize("other", OPERANDS, ids=lambda other: f"{getattr(other, 'shape', other)}")
@pytest.mark.parametrize("name", OPS)
def test_arithmetic_is_that_of_the_dense_tensor_or_would_be_dense(name, other, turned):
    op, z, dense = getattr(operator, name), codes(2, 5), dense_codes(2, 5)
    if turned and name == "pow":
        return
    plain = torch.as_tensor(other) if isinstance(other, np.ndarray) else other
    found, right = (op(other, z), op(plain, dense)) if turned and outcome(op, other, z) is not None else (None, None)
    if not turned:
        found, right = outcome(op, z, other), op(dense, plain)
    if found is None:
        right = op(plain, dense) if turned else op(dense, plain)
        assert right[dense == 0].any()  # NaN is not 0 either
    else:
        assert isinstance(found, SparseLatents)
        same(found, right)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("leading", SHAPES, ids=str)
def test_codes_with_codes(name, leading):
    op = getattr(operator, name)
    found, right = (
        outcome(op, codes(*leading), codes(*leading, seed=3)),
        (dense_codes(*leading), dense_codes(*leading, seed=3)),
    )
    assert (found is None) == (name in ("truediv", "pow", "le", "ge", "eq"))
    if found is not None:
        same(found, op(*right))


def test_what_people_write_of_codes():
    z, dense = codes(2, 5), dense_codes(2, 5)
    same((z > 0).sum(-1), (dense > 0).sum(-1))
    same((z > 0).float().mean((0, 1)), (dense > 0).float().mean((0, 1)))
    same((z != 0).any(-1), (dense != 0).any(-1))
    same(z * (z > 0.5), dense * (dense > 0.5))
    same(-z, -dense)
    same(abs(z), dense.abs())
    same(sum([z, z]), dense + dense)
    same(torch.sum(z, -1), dense.sum(-1))
    same(torch.abs(z), dense.abs())
    same(z.to(torch.float64), dense.double())
    assert z.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    assert z.detach().cpu().device.type == "cpu"


@pytest.mark.parametrize("name", ["sum", "mean", "amax"])
@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 1), (1, 2), (-1, 0), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_reductions_are_those_of_the_dense_tensor(name, dim, keepdim):
    z, dense = codes(2, 5), dense_codes(2, 5)
    every = tuple(range(3)) if dim is None else dim
    torch.testing.assert_close(getattr(z, name)(dim, keepdim), getattr(dense, name)(every, keepdim))


def test_the_largest_codes():
    z, dense = codes(2, 5), dense_codes(2, 5)
    for found in (z.topk(4), torch.topk(z, 4)):
        same(found.values, dense.topk(4).values)
        same(dense.gather(-1, found.indices), found.values)
    values, indices = z.max(-1)
    same(values, dense.max(-1).values)
    same(dense.gather(-1, indices[..., None])[..., 0], values)
    same(z.max(), dense.max())
    assert codes(2, 0).topk(3).values.shape == (2, 0, 3)
    with pytest.raises(TypeError, match="not that of the latents"):
        z.topk(2, dim=0)
    with pytest.raises(IndexError, match="dim: 3 is none of the 3 dimensions"):
        z.sum(3)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (torch.relu, r"torch's relu takes no SparseLatents; pass z.to_dense\(\)"),
        (lambda z: torch.stack([z, z]), r"torch's stack .* z.to_dense\(\)"),
        (bool, "truth of many codes"),
        (lambda z: z + torch.zeros(7), r"a tensor \[7\] does not stretch to codes \[2, 5, 12\]"),
        (lambda z: z * torch.ones(3, 2, 5, 1), "does not stretch"),
        (lambda z: z + codes(5), "are not of one shape"),
        (lambda z: z + "1", "unsupported operand"),
    ],
)
def test_what_codes_cannot_do_is_one_line(act, message):
    with pytest.raises(TypeError, match=message):
        act(codes(2, 5))


def test_other_methods_of_tensors_are_named():
    with pytest.raises(AttributeError, match=r"no 'relu'; z.to_dense\(\).relu has it"):
        codes(5).relu()
    with pytest.raises(AttributeError, match=r"no 'nonsense'$"):
        codes(5).nonsense()


def test_codes_are_told_apart_as_objects():
    z = codes(5)
    assert len({z, z, codes(5)}) == 2
    assert (z == "text") is False
    assert (z == None) is False  # noqa: E711
    assert z in [z]


def test_gradients_go_through_everything():
    dense = dense_codes(2, 5).double().requires_grad_()
    w = torch.rand(D).double().requires_grad_()

    def total(z):
        return (
            ((z * w + z[[1, 0]] - z / 3)[1] * 2).sum()
            + z[0, 1:4].topk(2).values.sum()
            + z[..., 3].sum()
            + z.amax(1).sum()
        )

    ours = torch.autograd.grad(total(SparseLatents.from_dense(dense)), [dense, w])
    for mine, right in zip(ours, torch.autograd.grad(total(dense), [dense, w]), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize(
    ("z", "said"),
    [
        (
            SparseLatents(torch.arange(0, 161, 16), torch.arange(16).repeat(10), torch.ones(160), 2048, (2, 5)),
            "SparseLatents(2 x 5 tokens, d_sae 2048, 160 nonzero, L0 16.0, float32)",
        ),
        (codes(), "SparseLatents(1 token, d_sae 12, 8 nonzero, L0 8.0, float32)"),
        (codes(2, 0) > 0, "SparseLatents(2 x 0 tokens, d_sae 12, 0 nonzero, L0 0.0, bool)"),
        (codes(3).to("meta"), "SparseLatents(3 tokens, d_sae 12, float32, meta)"),
    ],
)
def test_the_repr_is_one_line(z, said):
    assert repr(z) == said
