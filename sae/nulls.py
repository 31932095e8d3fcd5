"""What a reconstruction score is worth: the same number of active directions without training."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.coder import SparseCoder, initialize
from sae.metrics import fvu


def null_fvus(
    coder: SparseCoder, fitted: Float[Tensor, "n d"], test: Float[Tensor, "m d"]
) -> dict[str, dict[str, float]]:
    """Returns FVU and L0 on `test` of baselines fitted on `fitted`, for a coder that reads and writes one site.

    random_dictionary: an untrained coder of the same shape and rule, its output scaled to fit best.
    pca: as many principal components as the coder has active latents.
    """
    fitted, test = fitted.to(coder.W_enc.device), test.to(coder.W_enc.device)
    random = SparseCoder(coder.spec, fitted.device)
    y = coder.spec.normalization.apply(fitted)[0]
    initialize(random, y.mean(0), 0, "null")
    made, mean = random(fitted).out, fitted.mean(0)
    scale = ((made - mean) * (fitted - mean)).sum() / (made - mean).square().sum().clamp_min(1e-30)
    out, latents = random(test)
    active = float(coder.encode(test).l0().mean())
    rank = max(1, min(round(active), *fitted.shape))
    _, _, components = torch.linalg.svd((fitted - mean).double(), full_matrices=False)
    basis = components[:rank].float()
    projected = mean + (test - mean) @ basis.T @ basis
    return {
        "random_dictionary": {"fvu": fvu(test, mean + scale * (out - mean)), "l0": float(latents.l0().mean())},
        "pca": {"fvu": fvu(test, projected), "l0": float(rank)},
    }
