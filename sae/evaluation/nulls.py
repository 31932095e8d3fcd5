"""What a reconstruction score is worth: baselines that are not trained."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.sums import in_float64
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.evaluation.metrics import fvu
from sae.selection.topk import TopK

Pairs = tuple[Float[Tensor, "_n d_in"], Float[Tensor, "_n d_out"]]


def null_fvus(coder: SparseCoder, fitted: Pairs, test: Pairs) -> dict[str, dict[str, float]]:
    """Returns FVU (and L0) on `test` of baselines fitted on `fitted`, both (input, target).

    Of an autoencoder, random_dictionary: an untrained TopK coder of the same width with as many active latents, its
    output scaled to fit best; pca: as many principal components. Of a transcoder, linear_map: least squares.
    """
    (x, y), (x_test, y_test) = ([part.to(coder.device) for part in pair] for pair in (fitted, test))
    if not coder.spec.is_autoencoder:
        ones = [in_float64(torch.cat([part, part.new_ones(len(part), 1)], dim=1)) for part in (x, x_test)]
        solution = torch.linalg.lstsq(ones[0].cpu(), y.cpu().double(), driver="gelsd").solution.to(ones[1].device)
        return {"linear_map": {"fvu": fvu(y_test, ones[1] @ solution)}}
    rule = coder.spec.rule
    plain = coder.with_spec(coder.spec.with_(selection=coder.spec.selection.with_gradients(False)))
    implied = rule.implied_l0 if rule.gradient_loss else None
    active = implied or float(plain.encode(x_test).l0().mean())
    rank = max(1, min(round(active), *x.shape))
    spec = coder.spec.with_(selection=TopK(max(1, min(round(active), coder.spec.d_sae))), cross_layer=False)
    random = SparseCoder(spec.with_(calibration=()), x.device)
    initialize(random, coder.spec.normalize(x)[0].mean(0), 0, "null")
    made, mean = random(x).out, x.mean(0)
    scale = ((made - mean) * (x - mean)).sum() / (made - mean).square().sum().clamp_min(1e-30)
    out, latents = random(x_test)
    _, _, components = torch.linalg.svd(in_float64(x - mean), full_matrices=False)
    basis = components[:rank].to(x)
    projected = mean + (x_test - mean) @ basis.T @ basis
    return {
        "random_dictionary": {"fvu": fvu(x_test, mean + scale * (out - mean)), "l0": float(latents.l0().mean())},
        "pca": {"fvu": fvu(x_test, projected), "l0": float(rank)},
    }
