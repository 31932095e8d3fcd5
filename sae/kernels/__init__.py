"""`encode_at` and `decode` on a support, with gradients that touch nothing else: all that training and inference need.

`segmented` has both for few entries, `dense` for many and for every device. Row i of the codes owns entries
offsets[i]:offsets[i+1].
"""

from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import dense, segmented

__all__ = ["decode", "encode_at"]
# The share of all entries from which on dense products are faster on two CPU cores; ReLU coders begin at a half.
DENSE_SHARE = 0.3
SPARSE_ON = {"cpu", "cuda"}  # elsewhere, as on Apple's GPUs, PyTorch has not all of the sparse products


def encode_at(
    y: Float[Tensor, "n d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
    known: Float[Tensor, "nnz"] | None = None,
) -> Float[Tensor, "nnz"]:
    """Returns y W^T + b at the support, differentiable in y, W and b.

    `known` are these numbers where the caller has them already, from the product that selection looked at.
    """
    chosen = dense if _densely(offsets, ids, weight) else segmented
    return chosen.encode_at(y, weight, bias, offsets, ids, known)


def decode(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "d_sae d_out"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
) -> Float[Tensor, "n d_out"]:
    """Returns the codes times the decoder, differentiable in values and W."""
    chosen = dense if _densely(offsets, ids, weight) else segmented
    return chosen.decode(values, weight, offsets, ids)


def _densely(offsets: Tensor, ids: Tensor, weight: Tensor) -> bool:
    many = ids.numel() > DENSE_SHARE * (offsets.numel() - 1) * len(weight)
    return many or weight.device.type not in SPARSE_ON
