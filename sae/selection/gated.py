"""Gated: one affine map says whether a latent fires, another, tied to it, how much (Rajamanoharan 2024, 2404.16014).

    pi = W_enc y + b_enc                      (the gate: fires where pi > 0)
    m  = exp(r) * (W_enc y) + b_mag           (equation 7: the magnitude shares W_enc up to a scale for each latent)
    a  = 1[pi > 0] ReLU(m)

No gradient passes the step, so the gate learns by the terms `l1`, here the sum of ReLU(pi), and `gate`, the error of
decoding ReLU(pi) with the decoder held fixed. Without them nothing trains it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.codes import Support, where
from sae.kernels.scaling import exact
from sae.selection import Selection


@Selection.register_subclass("gated")
@dataclass(frozen=True)
class Gated(Selection):
    """Keeps the latents whose gate is open."""

    over: ClassVar[str] = "nothing"
    needs: ClassVar[tuple[tuple[str, ...], ...]] = (("gate",), ("l1",))
    gated: ClassVar[bool] = True
    reads_bias: ClassVar[bool] = True
    beside_scores: ClassVar[float] = 2.75
    units: ClassVar[Mapping[str, str] | None] = {"b_mag": "latents"}

    def parameters(self, d_sae: int, spread: float = 1.0) -> dict[str, Float[Tensor, "d_sae"]]:
        """Returns the log scale and the bias of the magnitudes."""
        return {"r_mag": torch.zeros(d_sae), "b_mag": torch.zeros(d_sae)}

    def moved(self, own: dict[str, Tensor], change: Float[Tensor, "d_sae"]) -> dict[str, Tensor]:
        """Returns the magnitudes' bias with what they see of the change."""
        shift = own["r_mag"].double().exp() * change
        return own | {"b_mag": (own["b_mag"].double() + shift).to(exact(own["b_mag"]))}

    def infer(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor]) -> Support:
        """Returns the entries whose gate is open."""
        return where(scores > 0)

    def cuts(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "m_or_1"] | None:
        """Returns 0."""
        return torch.zeros(1)

    def activate(
        self, kept: Float[Tensor, "nnz"], ids: Int[Tensor, "nnz"], tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "nnz"]:
        """Returns the magnitudes of the open latents, from their gates."""
        scale = tensors["r_mag"].exp()
        shift = tensors["b_mag"] - scale * tensors["b_enc"]
        return torch.relu(scale.index_select(0, ids) * kept + shift.index_select(0, ids))
