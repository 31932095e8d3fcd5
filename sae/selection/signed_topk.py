"""Signed TopK: each token keeps the k pre-activations of largest magnitude, with their signs and without ReLU.

A latent then stands for a direction and its opposite. The rule is sparsify's `signed` coder.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.selection import Selection
from sae.selection.topk import TopK


@Selection.register_subclass("signed_topk")
@dataclass(frozen=True)
class SignedTopK(TopK):
    """Keeps the k entries of largest magnitude of every token."""

    signed: ClassVar[bool] = True

    def rank(self, scores: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Returns magnitudes."""
        return scores.abs()
