"""In plain torch with its own gradients: slow, memory-hungry, obviously right; the others are tested against it."""

from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.codes import rows_of


def encode_at(
    y: Float[Tensor, "n d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
) -> Float[Tensor, "nnz"]:
    """Returns y W^T + b at the support."""
    return (y[rows_of(offsets)] * weight[ids]).sum(1) + bias[ids]


def decode(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "d_sae d_out"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
) -> Float[Tensor, "n d_out"]:
    """Returns the codes times the decoder."""
    out = weight.new_zeros(offsets.numel() - 1, weight.shape[1])
    return out.index_add(0, rows_of(offsets), values[:, None] * weight[ids])
