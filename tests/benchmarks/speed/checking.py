"""Do two libraries compute the same? Loss and gradients of a first step, of the same weights on the same tokens."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

LIMIT = 1e-5
"""Of |difference| / |gradient|, for every tensor, and of the loss: sums of thousands of float32 products in another
order differ by 1e-6."""
NEAR_TIES = 4
"""Latents that may differ by more: where a token's k-th and next pre-activation are equal up to rounding, either is
chosen, and both latents are left out of the comparison."""
TIED = 1e-3
"""Of the norm of an average latent's gradient, beyond which one counts as such."""
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Agreement:
    """How far another library's first step is from ours."""

    loss: float
    """Relative difference."""
    gradients: dict[str, float]
    """|theirs - factor x ours| / |factor x ours| by tensor, without the latents of near ties."""
    factor: float
    """Of all gradients at once: libraries clip by other norms, or not at all."""
    ties: int
    """Latents left out."""

    @property
    def largest(self) -> float:
        return max(self.gradients.values())

    @property
    def holds(self) -> bool:
        return self.loss <= LIMIT and self.largest <= LIMIT and self.ties <= NEAR_TIES

    def to_json(self) -> dict:
        return {**asdict(self), "holds": self.holds}


def agreement(ours: Path, theirs: Path, data: Path, losses: tuple[float, float]) -> Agreement:
    """Compares two files of gradients, one tensor at a time: there is little memory beside large coders."""
    with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b, safe_open(data, "pt") as given:

        def pair(name: str) -> tuple[Tensor, Tensor]:
            x, y = a.get_tensor(name), b.get_tensor(name)
            return (x, y) if name != "W_dec" else tuple(across(each, given.get_tensor("W")) for each in (x, y))

        squares, products = 0.0, 0.0
        for x, y in map(pair, NAMES):
            squares += float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
            products += float((x * y).sum(dtype=torch.float64))
        factor = products / squares
        tied, rows = torch.zeros(()), {}
        for name in NAMES:
            x, y = pair(name)
            rows[name] = [each.reshape(len(x), -1).norm(dim=1) for each in (y - factor * x, factor * x)]
            if x.ndim == 2:
                off, size = rows[name]
                tied = tied.logical_or(off > TIED * size.square().mean().sqrt())
    gradients = {}
    for name, (off, size) in rows.items():
        kept = ~tied if name != "b_dec" else slice(None)
        gradients[name] = float(off[kept].norm() / size[kept].norm())
    mine, other = losses
    return Agreement(abs(other - mine) / abs(mine), gradients, factor, int(tied.sum()))


def across(gradient: Tensor, W: Tensor) -> Tensor:
    """Returns a decoder's gradient without its parts along the decoder, as most libraries hand it to the optimizer."""
    return gradient - (gradient * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
