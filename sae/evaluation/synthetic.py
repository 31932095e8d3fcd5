"""Activations of which the truth is known: sums of few of many directions, to score any coder against.

    x_t = sum_i c_ti u_i + noise,   c_ti = Bernoulli(min(1, s_t p_i)) * Exponential(1),   s_t ~ lognormal(0, spread)

p follows a Zipf curve over the directions (shift q), scaled so that `active` fire per token on average before s_t.
The heavy-tailed factor s_t of a token is what a batch-wide budget can use: without it (spread 0) Mutual Choice gains
nothing over TopK.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.seeding import generator
from sae.base.zipf import Zipf
from sae.coder.coder import SparseCoder
from sae.evaluation.metrics import fvu


@dataclass(frozen=True)
class Synthetic:
    """A distribution of activations with known directions."""

    d: int = 32
    """Width of the activations."""
    n_directions: int = 96
    """True directions, random unit vectors."""
    active: float = 3.5
    """Mean number of active directions of a token whose factor is 1."""
    shift: float = 3.0
    """Shift q of the Zipf curve of firing rates; its exponent is 1."""
    spread: float = 0.8
    """Standard deviation of the logarithm of a token's factor."""
    noise: float = 0.02
    """Standard deviation of the noise in each coordinate."""
    seed: int = 0
    """Seed of directions and samples."""

    @property
    def directions(self) -> Float[Tensor, "n_directions d"]:
        """Returns the true directions, one unit vector a row."""
        rows = torch.randn(self.n_directions, self.d, generator=generator(self.seed, "directions"))
        return rows / rows.norm(dim=1, keepdim=True)

    @property
    def rates(self) -> Float[Tensor, "n_directions"]:
        """Returns the probability that each direction is active at a token whose factor is 1."""
        return (self.active * Zipf(1.0, self.shift).shares(self.n_directions)).float()

    def sample(self, n: int, *key: str | int) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n n_directions"]]:
        """Returns (activations, true codes) of n tokens; another key gives other tokens."""
        draw = generator(self.seed, "tokens", *key)
        factor = (self.spread * torch.randn(n, 1, generator=draw)).exp()
        fires = torch.rand(n, self.n_directions, generator=draw) < factor * self.rates
        codes = -torch.rand(n, self.n_directions, generator=draw).clamp_min(1e-12).log() * fires
        return codes @ self.directions + self.noise * torch.randn(n, self.d, generator=draw), codes


def score(
    coder: SparseCoder, truth: Synthetic, tokens: int = 8192, gradients: Tensor | None = None
) -> dict[str, float]:
    """Returns how well an autoencoder of one site does on fresh tokens, by its per-token rule.

    fvu, l0, dead_share (latents silent on these tokens); matched_cosine: the mean, over true directions, of the largest
    cosine with a decoder row (of signed codes, in magnitude).
    matched_f1: the mean F1 of that latent's firing against the direction's.
    """
    x, codes = truth.sample(tokens, "test")
    with torch.no_grad():
        out, latents = coder(x.to(coder.like), gradients)
    out, fired = out.cpu(), latents.to_dense().cpu() != 0
    cosines = truth.directions @ torch.nn.functional.normalize(coder.W_dec.detach().cpu().float(), dim=1).T
    cosine, matched = (cosines.abs() if coder.spec.selection.signed else cosines).max(1)
    hits = (fired[:, matched] & (codes > 0)).sum(0)
    f1 = 2 * hits / (fired[:, matched].sum(0) + (codes > 0).sum(0)).clamp_min(1)
    return {
        "fvu": fvu(x, out),
        "l0": float(fired.sum(1).double().mean()),
        "dead_share": float((~fired.any(0)).double().mean()),
        "matched_cosine": float(cosine.mean()),
        "matched_f1": float(f1.double().mean()),
    }
