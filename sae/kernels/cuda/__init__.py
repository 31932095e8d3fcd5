"""The sparse products, the choices and the update of a training step on an NVIDIA card, compiled by Triton.

Triton comes with torch's CUDA builds; without it this package cannot be imported. Weights and rows may be float32,
bfloat16 or float16; sums are taken in float32, in an order that only the sizes and the codes decide: no atomics, the
same bits in every run. No function waits for the device.
"""

import torch
from torch import Tensor

from sae.kernels.cuda.crossing import above
from sae.kernels.cuda.gradients import ByLatent, by_latent, weight_gradient
from sae.kernels.cuda.largest import top_ids
from sae.kernels.cuda.sparse import decode, errors, products
from sae.kernels.cuda.updating import adam

__all__ = [
    "ByLatent",
    "above",
    "adam",
    "by_latent",
    "decode",
    "errors",
    "products",
    "takes",
    "top_ids",
    "weight_gradient",
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(*tensors: Tensor | None) -> bool:
    """Returns whether this path is for all of these: on a card that CUDA knows of, float32 or shorter."""
    return all(t is None or (t.device.type == "cuda" and t.dtype in DTYPES) for t in tensors)
