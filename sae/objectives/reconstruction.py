"""Reconstruction as a fraction of variance unexplained.

    L = sum_t |x_t - x^_t|^2 / (N V),    V = E|x - mean|^2

V is measured once before training and frozen in the spec, so the value is comparable between steps, batches and ranks.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.objectives import Objective, Step


@Objective.register_subclass("reconstruction")
@dataclass(frozen=True)
class Reconstruction(Objective):
    """Squared error over the variance of the target."""

    of_latents: ClassVar[bool | None] = False

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the FVU of the micro-batch, weighted by its share of the batch."""
        return step.share(step.run.square)
