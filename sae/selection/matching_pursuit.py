"""Matching pursuit: latents are chosen one after the other, each the one that best explains what is left.

    r_0 = y     i = argmax_j <r_t, W_dec_j>     v = ReLU(<r_t, W_dec_i>)     a_i += v     r_{t+1} = r_t - v W_dec_i

(Costa 2025, arXiv 2506.03093, as SAELens implements it). A token is done when its support stays the same for a step or
its residual is short. The encoder is the decoder, so no pre-activation says by itself whether a latent fires; such
coders are loaded, not trained.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.kernels.codes import Support, where
from sae.selection import Factors, Owned, Selection


@Selection.register_subclass("matching_pursuit")
@dataclass(frozen=True)
class MatchingPursuit(Selection):
    """Chooses by the residual, up to a number of steps."""

    pursues: ClassVar[bool] = True
    residual_threshold: float = 1e-2
    """A token is done when the norm of its residual falls below this; 0 for never."""
    max_iterations: int | None = None
    """Most steps; None for as many as the input has components."""
    stop_on_duplicate_support: bool = True
    """Whether a token is done when a step adds no new latent."""

    def validate(self, d_sae: int) -> None:
        """Raises ConfigError if the number of steps or the threshold is out of range."""
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ConfigError(f"selection.max_iterations: {self.max_iterations} must be at least 1")
        if self.residual_threshold < 0:
            raise ConfigError(f"selection.residual_threshold: {self.residual_threshold} must not be negative")

    def rescaled(self, own: dict[str, Tensor], calibration: tuple[float, ...], by: Factors) -> Owned:
        """Returns the rule for residuals in the units of latents, which have one factor as long as decoders stay."""
        return replace(self, residual_threshold=self.residual_threshold * by.one), own, calibration

    def pursue(self, y: Float[Tensor, "n d"], weight: Float[Tensor, "m d"]) -> tuple[Support, Float[Tensor, "nnz"]]:
        """Returns the support and its values, for inputs and the decoder."""
        acts, residual = y.new_zeros(len(y), len(weight)), y.clone()
        live = torch.arange(len(y), device=y.device)  # the tokens that are not done
        for _ in range(self.max_iterations or y.shape[1]):
            best = (residual[live] @ weight.T).relu().max(dim=1).indices
            rows = weight[best]
            values = (residual[live] * rows).sum(1).relu()
            before = acts[live, best] != 0
            acts[live, best] += values
            residual[live] -= values[:, None] * rows
            done = torch.zeros_like(before)
            if self.stop_on_duplicate_support:
                done |= before | (values == 0)
            if self.residual_threshold > 0:
                done |= residual[live].norm(dim=1) < self.residual_threshold
            live = live[~done]
            if not len(live):
                break
        offsets, ids = where(acts != 0)
        return (offsets, ids), acts[acts != 0]
