"""Folding: the same map written with other tensors. Pure functions of (spec, tensors); `SparseCoder` has them as methods.

With n_i a factor for each latent, s a scale and M a matrix:

    latents times n      W_enc_i n_i, b_enc_i n_i, threshold_i n_i, W_dec_i / n_i
    inputs (x - m) M     W_enc M^T, b_enc - (m M) W_enc^T without a decoder pre-bias, W_dec M^-1, b_dec M^-1 + m
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.spec import CoderSpec

Coder = tuple[CoderSpec, dict[str, Tensor]]


def rescale_latents(spec: CoderSpec, tensors: dict[str, Tensor], factor: Float[Tensor, "d_sae"]) -> Coder:
    """Returns the coder whose latents are `factor` times as large, and whose output is the same.

    A rule that compares latents with each other now compares them in these units: choose otherwise and the map changes.
    """
    n = factor.float()
    changes = {"W_enc": n[:, None], "b_enc": n, "threshold": n, "b_mag": n, "W_dec": 1 / n[:, None]}
    return spec, {name: t.float() * changes[name] if name in changes else t for name, t in tensors.items()}


def whitening(
    spec: CoderSpec,
    tensors: dict[str, Tensor],
    mean: Float[Tensor, "d"],
    matrix: Float[Tensor, "d d"],
    inverse: Float[Tensor, "d d"],
) -> Coder:
    """Returns a coder of whitened inputs (x - mean) matrix as one of raw inputs x (2511.13981)."""
    mean, matrix, inverse = mean.double(), matrix.double(), inverse.double()
    W_enc = tensors["W_enc"].double() @ matrix.T
    changed = {
        "W_enc": W_enc,
        "W_dec": tensors["W_dec"].double() @ inverse,
        "b_dec": tensors["b_dec"].double() @ inverse + mean,
    }
    if spec.pre_bias == "none":
        changed["b_enc"] = tensors["b_enc"].double() - W_enc @ mean
    return spec, {**tensors, **{name: tensor.to(torch.float32) for name, tensor in changed.items()}}
