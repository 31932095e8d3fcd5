"""Sparse codes and the products on them: all that training and inference need beside the encoder's one dense product.

`encode_at`, `decode` and `fit` are differentiable, with gradients that touch the support alone
(`differentiable.py`); a training step collects those of the weights in a `Sink`. What computes them is a *path*
(`dispatch.py`), whose functions `reference.py` defines. Row i of the codes owns entries offsets[i]:offsets[i+1].
"""

from sae.kernels.differentiable import decode, encode_at, fit
from sae.kernels.dispatch import kernel, path, use
from sae.kernels.sink import Sink

__all__ = ["Sink", "decode", "encode_at", "fit", "kernel", "path", "use"]
