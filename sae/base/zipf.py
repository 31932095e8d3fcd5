"""How often latents fire, as a shifted Zipf curve over their rank: fitted to densities, and dealt out as budgets.

p_r = c (r + q)^-s,   r = 1, 2, ...
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

FITTED_SHARE = 0.9  # of the ranks: measured densities follow the curve but for the low end (2411.02124's reviews)
SHIFTS = 33


@dataclass(frozen=True)
class Zipf:
    """A shifted Zipf curve and how well it fits."""

    exponent: float = 1.0
    """s; 0 is the same density for all."""
    shift: float = 3.0
    """q; the larger, the flatter the head of the curve."""
    r2: float = 0.0
    """Share of the variance of the log densities that the fit explains."""

    def shares(self, m: int) -> Float[Tensor, "m"]:
        """Returns the share of every rank, first the largest; they sum to 1."""
        ranks = torch.arange(1, m + 1, dtype=torch.float64)
        return (-self.exponent * (ranks + self.shift).log()).softmax(0)


def fit(density: Float[Tensor, "m"], exponent: float | None = None, shift: float | None = None) -> Zipf:
    """Returns the curve nearest to densities in the logarithm: least squares for s and c, the best of a grid for q.

    A given exponent or shift is kept and the rest fitted beside it. Only positive densities and the first 90 % of the
    ranks count. With fewer than three of them, or if they do not fall with the rank, what is fitted is 0.
    """
    flat = Zipf(exponent or 0.0, shift or 0.0)
    ordered = density.cpu().double().sort(descending=True).values[: max(1, int(FITTED_SHARE * len(density)))]
    ordered = ordered[ordered > 0]
    if len(ordered) < 3:
        return flat
    shifts = torch.cat([torch.zeros(1), torch.logspace(-1, torch.tensor(len(density)).log10(), SHIFTS - 1)]).double()
    shifts = shifts if shift is None else torch.tensor([shift]).double()
    x = (torch.arange(1, len(ordered) + 1) + shifts[:, None]).log()
    y = ordered.log()
    x0, y0 = x - x.mean(1, keepdim=True), y - y.mean()
    slope = (x0 * y0).sum(1) / x0.square().sum(1) if exponent is None else torch.full((len(x),), -exponent)
    error = (y0 - slope[:, None] * x0).square().sum(1)
    best = int(error.argmin())
    spread = float(y0.square().sum())
    if exponent is None and (spread < 1e-12 or slope[best] >= 0):
        return flat
    return Zipf(-float(slope[best]), float(shifts[best]), 1 - float(error[best]) / max(spread, 1e-300))


def ranked(shares: Float[Tensor, "m"], density: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Returns the share of every latent: that of its rank by density, ties to the lower id."""
    order = torch.argsort(density.cpu(), descending=True, stable=True)
    return torch.empty_like(shares).scatter_(0, order, shares)


def budgets(wanted: Float[Tensor, "m"], total: int, most: int, least: int) -> Int[Tensor, "m"]:
    """Returns whole numbers between `least` and `most` that sum to `total`, each next to what is wanted.

    Where the bounds take from some, the others share what is left in proportion (water filling). Fractions go to the
    largest remainders, ties to the lower index. `total` must lie between m x least and m x most.
    """
    filled = fill(wanted.double(), total, most, least)
    found = filled.floor().clamp(least, most)
    missing = total - int(found.sum())
    while missing:
        sign = 1 if missing > 0 else -1
        room = (found < most) if sign > 0 else (found > least)
        rest = torch.where(room, sign * (filled - found), -torch.inf)
        chosen = torch.argsort(rest, descending=True, stable=True)[: min(abs(missing), int(room.sum()))]
        found[chosen] += sign
        missing -= sign * len(chosen)
    return found.long()


def fill(wanted: Float[Tensor, "m"], total: int, most: int, least: int) -> Float[Tensor, "m"]:
    """Returns clamp(c wanted, least, most) for the c with which it sums to `total`, found by bisection."""
    wanted = wanted.clamp_min(1e-12)
    low, high = 0.0, most / float(wanted.min())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * wanted).clamp(least, most).sum()) < total else (low, middle)
    return (high * wanted).clamp(least, most)
