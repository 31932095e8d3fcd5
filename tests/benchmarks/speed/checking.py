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
"""Tokens whose k-th and next pre-activation are equal up to rounding may be decided either way: as many latents
beside two for each of them may differ beyond the limit."""
EPSILON = 1e-30


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


def along_removed(gradient: Tensor, W: Tensor) -> Tensor:
    """Returns a decoder's gradient without its parts along the decoder, as most libraries hand it to the optimizer."""
    return gradient - (gradient * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W


def agreement(ours: Path, theirs: Path, data: Path, losses: tuple[float, float]) -> Agreement:
    """Compares two files of gradients."""
    with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b, safe_open(data, "pt") as given:
        W = given.get_tensor("W")
        pairs = {}
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            pairs[name] = [file.get_tensor(name) for file in (a, b)]
        pairs["W_dec"] = [along_removed(gradient, W) for gradient in pairs["W_dec"]]
    square = sum(float(x.double().square().sum()) for x, _ in pairs.values())
    factor = sum(float((x * y).sum(dtype=torch.float64)) for x, y in pairs.values()) / square
    off = torch.zeros(len(W), dtype=torch.bool)
    for name in ("W_enc", "W_dec"):
        x, y = pairs[name]
        rows = (y - factor * x).norm(dim=1)
        off |= rows > 100 * LIMIT * factor * x.norm() / len(W) ** 0.5
    gradients = {}
    for name, (x, y) in pairs.items():
        kept = torch.ones(len(x), dtype=torch.bool) if name == "b_dec" else ~off
        scale = factor * x[kept].norm()
        gradients[name] = float((y[kept] - factor * x[kept]).norm() / (scale + EPSILON))
    mine, other = losses
    return Agreement(abs(other - mine) / abs(mine), gradients, factor, int(off.sum()))
