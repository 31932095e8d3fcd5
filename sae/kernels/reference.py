"""The definition of every kernel, in plain torch: slow, large, obviously right; the others are tested against it.

Codes are compressed rows: row t owns entries offsets[t]:offsets[t+1] of ids and values.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels.codes import ByLatent
from sae.kernels.rows import counted, offsets_of, rows_of
from sae.kernels.update import Update


def top_ids(scores: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """Returns the ids of the k largest of every row, ascending; ties go to the lower id, NaN is larger than all."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values


def above(
    scores: Float[Tensor, "n m"], cuts: Float[Tensor, "m_or_1"], capacity: int
) -> tuple[Int[Tensor, "n"], Int[Tensor, "capacity"], Int[Tensor, ""]]:
    """Returns (found entries of each row, where they lie in the flat matrix, how many there are above their cut).

    Found are the first `capacity` of them; the places beyond the last are -1. The number says of more only that there
    are more. NaN lies above.
    """
    places = (~(scores <= cuts)).flatten().nonzero()[:, 0]
    filled = places.new_full((capacity,), -1)
    filled[: len(places)] = places[:capacity]
    rows = torch.div(places[:capacity], scores.shape[1], rounding_mode="floor")
    return counted(rows, len(scores)), filled, torch.tensor(len(places), device=scores.device)


def decode(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "m d"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
) -> Float[Tensor, "n d"]:
    """Returns the codes times the decoder."""
    out = weight.new_zeros(offsets.numel() - 1, weight.shape[1])
    return out.index_add(0, rows_of(offsets, len(ids)), values[:, None].to(weight.dtype) * weight[ids])


def products(
    offsets: Int[Tensor, "n_plus_1"], ids: Int[Tensor, "nnz"], rows: Float[Tensor, "n d"], weight: Float[Tensor, "m d"]
) -> Float[Tensor, "nnz"]:
    """Returns <rows_t, weight_j> for every entry (t, j)."""
    return (rows[rows_of(offsets, len(ids))] * weight[ids]).sum(1)


def errors_by(decode: Callable[..., Tensor], products: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the function `errors` of a path, made of two: where no kernel visits a token's rows once for both."""

    def errors(
        values: Float[Tensor, "nnz"],
        weight: Float[Tensor, "m d"],
        offsets: Int[Tensor, "n_plus_1"],
        ids: Int[Tensor, "nnz"],
        rest: Float[Tensor, "*n d"],
        target: Float[Tensor, "n d"],
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "nnz"]]:
        """Returns (target - rest - codes times decoder, the products of that with the decoder at the support)."""
        error = (target - rest).sub_(decode(values, weight, offsets, ids))
        return error, products(offsets, ids, error, weight)

    return errors


errors = errors_by(decode, products)


def by_latent(offsets: Int[Tensor, "n_plus_1"], ids: Int[Tensor, "nnz"], m: int) -> ByLatent:
    """Returns the entries sorted by latent, those of a latent in their order."""
    order = torch.argsort(ids, stable=True)
    return ByLatent(offsets_of(counted(ids, m)), order, rows_of(offsets, len(ids))[order])


def weight_gradient(
    by: ByLatent, coefficients: Float[Tensor, "nnz"], rows: Float[Tensor, "n d"], out: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    """Writes, of each latent, the sum over its entries of coefficient times row; returns the sum of squares of all."""
    latents = rows_of(by.starts, len(by.order))
    out.zero_().index_add_(0, latents, coefficients[by.order, None].to(out.dtype) * rows[by.tokens.long()])
    return out.double().square().sum()


def adam(
    weight: Float[Tensor, "m *d"],
    gradient: Float[Tensor, "m *d"],
    mean: Float[Tensor, "m *d"],
    square: Float[Tensor, "m *d"],
    update: Update,
    *,
    along: Float[Tensor, "m"] | None = None,
    unit: bool = False,
    half: Tensor | None = None,
    touched: Bool[Tensor, "m"] | None = None,
) -> None:
    """Takes a step of Adam (Kingma 2015, algorithm 1) in place, if it applies.

    `along` [m], the product of gradient and weight row by row, removes from the gradient what only changes the norms of
    rows that have norm 1; `unit` then divides rows by their norms. `half` gets the new weights. Where there is
    `touched`, rows that are not stay as they are, with what is remembered of them. The gradient may be overwritten.
    """
    _, beta1, beta2, eps, step, scale, applies = update
    corrected = [1 - beta ** step.to(square.dtype) for beta in (beta1, beta2)]
    g = gradient * scale
    if along is not None:
        g = g - (along * scale)[:, None] * weight
    m = torch.lerp(mean, g, 1 - beta1)
    v = beta2 * square + (1 - beta2) * g * g
    w = weight - update.rate / corrected[0] * m / (v.sqrt() / corrected[1].sqrt()).add(eps)
    if unit:
        w = w / w.norm(dim=1, keepdim=True).clamp_min(1e-30)
    if touched is not None:
        applies = applies & touched.view(-1, *[1] * (weight.dim() - 1))
    for old, new in ((weight, w), (mean, m), (square, v)):
        old.copy_(torch.where(applies, new, old))
    if half is not None:
        half.copy_(torch.where(applies, weight.to(half.dtype), half))
