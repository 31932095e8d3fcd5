"""L1: the sum of activations, each weighted by its decoder's norm (Anthropic's April 2024 update; Bricken 2023).

    L = sum_t sum_i ReLU(h_ti) |W_dec_i| / (N sqrt(V))        (|h_ti| where codes are signed)

The decoder's norm keeps a free decoder from evading the penalty by growing; with unit rows it is 1. sqrt(V), the scale
of the inputs, frees the weight of units. Of a gated coder the penalty falls on the gates, as its paper has it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.objectives import Objective, Shrinking, Step


@Objective.register_subclass("l1")
@dataclass(frozen=True)
class L1(Shrinking):
    """Sum of activations times decoder norms."""

    weight: float = 0.1

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the penalty per token."""
        norms = step.coder.decoder_norms().index_select(0, step.run.latents.ids)
        kept = step.run.kept
        sizes = kept.abs() if step.coder.spec.selection.signed else torch.relu(kept)
        return (sizes * norms).sum() / (step.n_tokens * step.variance**0.5)
