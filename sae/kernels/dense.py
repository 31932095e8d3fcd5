"""The sparse products by way of dense ones: for codes so dense that skipping zeros costs more than multiplying them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def spmm(
    offsets: Int[Tensor, "rows_plus_1"],
    columns: Int[Tensor, "nnz"],
    values: Float[Tensor, "nnz"],
    matrix: Float[Tensor, "m d"],
) -> Float[Tensor, "rows d"]:
    """Returns the sparse matrix times `matrix`."""
    full = matrix.new_zeros(offsets.numel() - 1, len(matrix))
    full[_rows(offsets), columns] = values.to(matrix.dtype)
    return full @ matrix


def sddmm(
    offsets: Int[Tensor, "rows_plus_1"],
    columns: Int[Tensor, "nnz"],
    a: Float[Tensor, "rows d"],
    b: Float[Tensor, "m d"],
) -> Float[Tensor, "nnz"]:
    """Returns <a_i, b_j> for every entry (i, j) of the support."""
    return (a @ b.T)[_rows(offsets), columns]


def _rows(offsets: Int[Tensor, "rows_plus_1"]) -> Int[Tensor, "nnz"]:
    return torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())
