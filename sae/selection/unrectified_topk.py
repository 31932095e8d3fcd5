"""Unrectified TopK: each token keeps its k largest pre-activations as they are, negative ones too.

circuit-tracer's transcoders choose so. It differs from `topk` where fewer than k pre-activations are positive.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from sae.selection import Selection
from sae.selection.topk import TopK


@Selection.register_subclass("unrectified_topk")
@dataclass(frozen=True)
class UnrectifiedTopK(TopK):
    """Keeps the k largest of every token, without ReLU."""

    signed: ClassVar[bool] = True

    def activate(
        self, kept: Float[Tensor, "nnz"], ids: Int[Tensor, "nnz"], tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "nnz"]:
        """Returns the pre-activations as they are."""
        return kept
