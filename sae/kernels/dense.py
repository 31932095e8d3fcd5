"""By way of dense products: for codes so dense that skipping zeros costs more than multiplying them, on every device.

Callers cut the tokens into tiles, so that no matrix of all tokens and latents is ever there.
"""

from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.reference import errors_by
from sae.kernels.rows import flat


def decode(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "m d"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
) -> Float[Tensor, "n d"]:
    """Returns the codes times the decoder."""
    return matrix(values.to(weight.dtype), offsets, ids, len(weight)) @ weight


def products(
    offsets: Int[Tensor, "n_plus_1"], ids: Int[Tensor, "nnz"], rows: Float[Tensor, "n d"], weight: Float[Tensor, "m d"]
) -> Float[Tensor, "nnz"]:
    """Returns <rows_t, weight_j> for every entry (t, j)."""
    every = (rows @ weight.T).view(-1)
    return every if every.numel() == ids.numel() else every.index_select(0, flat(offsets, ids, len(weight)))


errors = errors_by(decode, products)


def matrix(
    values: Float[Tensor, "nnz"], offsets: Int[Tensor, "n_plus_1"], ids: Int[Tensor, "nnz"], m: int
) -> Float[Tensor, "n m"]:
    """Returns codes as a matrix."""
    n = offsets.numel() - 1
    if values.numel() == n * m:
        return values.view(n, m)
    return values.new_zeros(n * m).scatter_add_(0, flat(offsets, ids, m), values).view(n, m)
