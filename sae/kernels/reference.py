"""The sparse products in plain torch: slow, memory-hungry, obviously right; the fast ones are tested against them."""

from jaxtyping import Float, Int
from torch import Tensor

from sae.compressed import rows_of


def spmm(
    offsets: Int[Tensor, "rows_plus_1"],
    columns: Int[Tensor, "nnz"],
    values: Float[Tensor, "nnz"],
    dense: Float[Tensor, "m d"],
) -> Float[Tensor, "rows d"]:
    """Returns the sparse matrix times `dense`."""
    rows = rows_of(offsets)
    out = dense.new_zeros(offsets.numel() - 1, dense.shape[1])
    return out.index_add(0, rows, values[:, None] * dense[columns])


def sddmm(
    offsets: Int[Tensor, "rows_plus_1"],
    columns: Int[Tensor, "nnz"],
    a: Float[Tensor, "rows d"],
    b: Float[Tensor, "m d"],
) -> Float[Tensor, "nnz"]:
    """Returns <a_i, b_j> for every entry (i, j) of the support."""
    rows = rows_of(offsets)
    return (a[rows] * b[columns]).sum(1)
