"""How often latents fire, as a shifted Zipf curve over their rank: fitted to densities, and dealt out as budgets.

p_r = c (r + q)^-s,   r = 1, 2, ...

All of it is computed where the densities lie, in a fixed number of operations, so that the host waits for nothing.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

FITTED_SHARE = 0.9  # of the ranks: measured densities follow the curve but for the low end (2411.02124's reviews)
SHIFTS = 33
LEAST = 1e-12  # of what is wanted: who wants nothing has a share too where the others can take no more


@dataclass(frozen=True)
class Zipf:
    """A shifted Zipf curve and how well it fits; numbers, or tensors of one number where it was fitted."""

    exponent: float | Float[Tensor, ""] = 1.0
    """s; 0 is the same density for all."""
    shift: float | Float[Tensor, ""] = 3.0
    """q; the larger, the flatter the head of the curve."""
    r2: float | Float[Tensor, ""] = 0.0
    """Share of the variance of the log densities that the fit explains."""

    def shares(self, m: int) -> Float[Tensor, "m"]:
        """Returns the share of every rank, first the largest; they sum to 1. They lie where the curve does."""
        device = self.exponent.device if isinstance(self.exponent, Tensor) else None
        ranks = torch.arange(1, m + 1, dtype=torch.float64, device=device)
        return (-self.exponent * (ranks + self.shift).log()).softmax(0)


def fit(density: Float[Tensor, "m"], exponent: float | None = None, shift: float | None = None) -> Zipf:
    """Returns the curve nearest to densities in the logarithm: least squares for s and c, the best of a grid for q.

    A given exponent or shift is kept and the rest fitted beside it. Only positive densities and the first 90 % of the
    ranks count. With fewer than three of them, or if they do not fall with the rank, what is fitted is 0.
    """
    m, like = len(density), {"dtype": torch.float64, "device": density.device}
    ordered = density.double().sort(descending=True).values[: max(1, int(FITTED_SHARE * m))]
    counts = (ordered > 0).double()
    n = counts.sum()
    if shift is None:
        shifts = torch.cat([torch.zeros(1, **like), torch.logspace(-1, math.log10(m), SHIFTS - 1, **like)])
    else:
        shifts = torch.full((1,), shift, **like)
    x = (torch.arange(1, len(ordered) + 1, **like) + shifts[:, None]).log_()
    y = torch.where(ordered > 0, ordered, 1.0).log()
    y = (y - y.sum() / n) * counts  # those that do not count are 0 in every sum
    x = x.sub_((x @ counts / n)[:, None]).mul_(counts)
    spread, along, across = y.square().sum(), x @ y, x.square().sum(1)
    slope = along / across if exponent is None else torch.full_like(along, -exponent)
    error = spread - 2 * slope * along + slope.square() * across
    best = error.argmin(0, keepdim=True)
    slope, shift_found, error = (found.gather(0, best)[0] for found in (slope, shifts, error))
    r2 = 1 - error.clamp_min(0) / spread.clamp_min(1e-300)
    falls = n >= 3
    if exponent is None:
        falls = falls & (spread >= 1e-12) & (slope < 0)
    flat = exponent or 0.0, shift or 0.0, 0.0
    found = (torch.where(falls, own, other) for own, other in zip((-slope, shift_found, r2), flat, strict=True))
    return Zipf(*found)


def ranked(shares: Float[Tensor, "m"], density: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Returns the share of every latent: that of its rank by density, ties to the lower id."""
    order = torch.argsort(density, descending=True, stable=True)
    return torch.empty_like(shares).scatter_(0, order, shares)


def budgets(wanted: Float[Tensor, "m"], total: int, most: int, least: int) -> Int[Tensor, "m"]:
    """Returns whole numbers between `least` and `most` that sum to `total`, each next to what is wanted.

    Where the bounds take from some, the others share what is left in proportion (water filling). Fractions go to the
    largest remainders, ties to the lower index. `total` must lie between m x least and m x most.
    """
    filled = fill(wanted.double(), total, most, least)
    found = filled.floor().clamp(least, most)
    rest = torch.where(found < most, filled - found, -torch.inf)
    order = torch.argsort(rest, descending=True, stable=True)
    # Fractions sum to what is missing, and each is below 1, so that there are as many latents with one.
    first = torch.arange(len(order), device=order.device) < total - found.sum()
    return found.long().scatter_add_(0, order, first.long())


def fill(wanted: Float[Tensor, "m"], total: int, most: int, least: int) -> Float[Tensor, "m"]:
    """Returns clamp(c wanted, least, most) for the c with which it sums to `total`.

    The sum grows with c, and bends where somebody comes to a bound. What it is at each bend says who is at a bound in
    the end; the others share the rest.
    """
    m, order = len(wanted), torch.argsort(wanted, descending=True, stable=True)
    falling = wanted.clamp_min(LEAST)[order]
    tails = torch.cat([falling.flip(0).cumsum(0).flip(0), falling.new_zeros(1)])  # the sums from each place on

    def filled(c: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
        full = torch.searchsorted(-falling, -most / c, right=True)
        low = torch.searchsorted(-falling, -least / c).clamp_min(full) if least else m
        return most * full + c * (tails[full] - tails[low]) + least * (m - low)

    full = (filled(most / falling) <= total).sum()
    low = m - (filled(least / falling) >= total).sum() if least else torch.full_like(full, m if total else 0)
    place = torch.arange(m, device=wanted.device)
    between = (place >= full) & (place < low)
    c = (total - most * full - least * (m - low)) / torch.where(between, falling, 0.0).sum().clamp_min(LEAST)
    dealt = torch.where(place < full, most, torch.where(place < low, c * falling, least)).clamp(least, most)
    return torch.empty_like(dealt).scatter_(0, order, dealt)
