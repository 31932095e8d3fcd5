"""Shapes in signatures are checked while tests run: of every room, and in each test anew."""

import jaxtyping
import numpy as np
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from rigs import shapes
from torch import Tensor

from interp.evidence.codes import row_blocks
from sae.base.zipf import ranked
from sae.kernels.codes import SparseLatents, rows_of
from sae.lm.masking import MaskSpec, token_mask

WRONG = [
    (rows_of, (torch.zeros(2, 2, dtype=torch.long),)),
    (rows_of, (torch.zeros(2),)),
    (token_mask, (torch.zeros(3, dtype=torch.long), MaskSpec())),
    (ranked, (torch.zeros(3), torch.zeros(4))),
    (row_blocks, (None, np.zeros((2, 2), np.int64))),
    (SparseLatents, (torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long), torch.zeros(4), 8)),
]


@pytest.mark.parametrize(("function", "arguments"), WRONG)
def test_a_wrong_shape_is_refused(function, arguments):
    with pytest.raises(TypeCheckError):
        function(*arguments)


def test_what_is_returned_is_checked_too():
    flattened = jaxtyping.jaxtyped(typechecker=shapes.checked)(_flattened)
    with pytest.raises(TypeCheckError, match="return"):
        flattened(torch.zeros(2, 2))


@pytest.mark.parametrize("_test", ["the first", "the second"])
def test_the_first_calls_of_every_test_are_checked(_test):
    for _ in range(shapes.CALLS - 1):
        rows_of(torch.tensor([0, 1]))
    with pytest.raises(TypeCheckError):
        rows_of(torch.zeros(2))


def _flattened(x: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    return x.reshape(-1)
