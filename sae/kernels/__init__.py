"""Sparse codes and the products on them: all that training and inference need beside the encoder's one dense product.

`encode_at`, `decode` and `fit` are differentiable, with gradients that touch the support alone
(`differentiable.py`); a training step collects those of the weights in a `Sink`. What computes them is a *path*
(`dispatch.py`), whose functions `reference.py` defines. Row i of the codes owns entries offsets[i]:offsets[i+1].
"""

from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.differentiable import decode, encode_at, fit
from sae.kernels.dispatch import PATHS, best, check, kernel, path, use
from sae.kernels.sink import Gradient, Sink

__all__ = [
    "PATHS",
    "Gradient",
    "Sink",
    "best",
    "check",
    "decode",
    "encode_at",
    "fit",
    "kernel",
    "path",
    "top_ids",
    "use",
]


def top_ids(scores: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """Returns the ids of the k largest of every row, ascending; ties go to the lower id, NaN is larger than all."""
    return kernel("top_ids", scores)(scores, k)
