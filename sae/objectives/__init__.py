"""Objectives: the terms of the training loss. One term a file, each a frozen config that computes itself.

Every term is a sum over tokens divided by numbers fixed before the step (the tokens of the whole batch, a variance
measured earlier), so that micro-batches and ranks add up to the same loss and gradient.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.coder import Pass, SparseCoder
from sae.plugins import Plugin, discover


@dataclass(frozen=True)
class Step:
    """What an objective sees of one micro-batch."""

    coder: SparseCoder
    run: Pass
    target: Float[Tensor, "n d_out"]
    """The activations to predict, in the normalized space."""
    n_tokens: int
    """Tokens of the whole batch, over all micro-batches and ranks."""
    variance: float
    """E|target - mean|^2, measured once before training."""
    residual_variance: float
    """Variance of the residual at the previous step."""
    dead: Bool[Tensor, "d_sae"]
    """Latents that have not fired for `dead_after_tokens` tokens, as known at the start of the step."""


@dataclass(frozen=True)
class Objective(Plugin):
    """One term of the loss."""

    weight: float = 1.0
    """Factor of the term."""

    def validate(self, d_in: int, d_sae: int) -> None:
        """Raises ConfigError if a constant does not fit the coder."""

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the term for this micro-batch, before `weight`."""
        raise NotImplementedError


def zero(step: Step) -> Float[Tensor, ""]:
    """Returns an exact zero for a term that does not apply at this step."""
    return torch.zeros((), device=step.target.device, dtype=step.target.dtype)


discover(__name__, __path__)
