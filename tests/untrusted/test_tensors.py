"""Tensors are taken with their shapes; what is left over, or not finite, is refused."""

import pytest
import torch

from sae.base.errors import DataError
from sae.untrusted.tensors import Tensors, check_finite


def tensors(**found):
    return Tensors("file", found)


def test_tensors_are_taken_with_their_shape_or_named():
    found = tensors(W_enc=torch.ones(3, 2), k=torch.tensor(4))
    assert found.take("W_enc").shape == found.take("W_enc", 3, 2).shape == (3, 2)
    with pytest.raises(DataError, match=r"^file: tensor W_enc has shape \(3, 2\), expected \(2, 3\)$"):
        found.take("W_enc", 2, 3)
    with pytest.raises(DataError, match=r"^file: tensor W_ec is missing\. Did you mean 'W_enc'\?$"):
        found.take("W_ec")
    assert found.number("k") == 4
    assert len(found) == 2


def test_a_matrix_is_turned_as_it_must_be():
    w = torch.randn(3, 2)
    assert torch.equal(tensors(w=w).matrix("w", 3, 2), w)
    assert torch.equal(tensors(w=w).matrix("w", 2, 3), w.T)
    square = torch.randn(3, 3)
    assert torch.equal(tensors(w=square).matrix("w", 3, 3), square)
    assert torch.equal(tensors(w=square).matrix("w", 3, 3, transposed=True), square.T)
    with pytest.raises(DataError, match=r"tensor w has shape \(3, 2\), expected \(3, 4\) or its transpose"):
        tensors(w=w).matrix("w", 3, 4)


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(0), torch.tensor(float("nan")), torch.tensor([torch.inf])])
def test_a_number_is_one_and_finite(value):
    with pytest.raises(DataError, match=r"^file: tensor k (has shape|holds NaN or Inf)"):
        tensors(k=value).number("k")


def test_what_is_left_over_is_refused():
    found = tensors(a=torch.ones(1), b=torch.ones(1), c=torch.ones(1))
    found.take("a")
    found.ignore("b", "not there")
    with pytest.raises(DataError, match=r"^file: tensor c is not part of this format"):
        found.refuse_unused()
    assert list(dict(found)) == ["a", "b", "c"]
    found.refuse_unused()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_nan_and_infinity_are_found_in_every_precision(dtype):
    for shape, bad in (((), torch.nan), ((5,), torch.inf), ((3, 4), -torch.inf)):
        tensor = torch.ones(shape)
        check_finite({"w": tensor.to(dtype), "i": torch.ones(2, dtype=torch.int64), "e": torch.ones(0, 3)}, "file")
        tensor.view(-1)[-1] = bad
        with pytest.raises(DataError, match=rf"^file: tensor w holds NaN or Inf, read as {dtype}$"):
            check_finite({"w": tensor.to(dtype)}, "file")


def test_nan_is_found_wherever_it_is_in_a_large_tensor():
    tensor = torch.ones(300, 70_000, dtype=torch.float16)  # which is looked at in parts
    check_finite({"w": tensor, "t": tensor.T}, "file")
    for place in (0, 16_777_216, -1):
        tensor.view(-1)[place] = torch.nan
        for w in (tensor, tensor.T):
            with pytest.raises(DataError, match="tensor w holds NaN or Inf"):
                check_finite({"w": w}, "file")
        tensor.view(-1)[place] = 1
