"""Tanh: a penalty that saturates, so that strong latents are not shrunk (Anthropic's cross-layer transcoders, 2025).

L = sum_t sum_i tanh(c |a_ti| |W_dec_i| / sqrt(V)) / N
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.objectives import Objective, Shrinking, Step
from sae.selection import Selection


@Objective.register_subclass("tanh")
@dataclass(frozen=True)
class Tanh(Shrinking):
    """Saturating sum of activations times decoder norms."""

    weight: float = 0.01
    c: float = 4.0
    """Slope at 0, in units of one over the root of the target's variance."""

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError if a constant is out of range."""
        super().validate(d_sae, selection, n_blocks)
        if not self.c > 0:
            raise ConfigError(f"objectives.tanh.c: {self.c} must be positive")

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the penalty per token."""
        latents = step.run.latents
        size = latents.values.abs() * step.coder.decoder_norms().index_select(0, latents.ids) / step.variance**0.5
        return torch.tanh(self.c * size).sum() / step.n_tokens
