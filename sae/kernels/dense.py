"""The sparse products by way of dense ones: for codes so dense that skipping zeros costs more than multiplying them."""

from jaxtyping import Float, Int
from torch import Tensor

from sae.compressed import rows_of


def spmm(
    offsets: Int[Tensor, "rows_plus_1"],
    columns: Int[Tensor, "nnz"],
    values: Float[Tensor, "nnz"],
    matrix: Float[Tensor, "m d"],
) -> Float[Tensor, "rows d"]:
    """Returns the sparse matrix times `matrix`."""
    full = matrix.new_zeros(offsets.numel() - 1, len(matrix))
    full[rows_of(offsets), columns] = values.to(matrix.dtype)
    return full @ matrix


def sddmm(
    offsets: Int[Tensor, "rows_plus_1"],
    columns: Int[Tensor, "nnz"],
    a: Float[Tensor, "rows d"],
    b: Float[Tensor, "m d"],
) -> Float[Tensor, "nnz"]:
    """Returns <a_i, b_j> for every entry (i, j) of the support."""
    return (a @ b.T)[rows_of(offsets), columns]
