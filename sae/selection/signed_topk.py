"""Signed TopK: each token keeps the k pre-activations of largest magnitude, with their signs and without ReLU.

A latent then stands for a direction and its opposite. The rule is sparsify's `signed` coder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.codes import Support, by_rows
from sae.kernels.largest import top_ids
from sae.selection import Budget, Moment, Selection


@Selection.register_subclass("signed_topk")
@dataclass(frozen=True)
class SignedTopK(Budget):
    """Keeps the k entries of largest magnitude of every token."""

    signed: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    units: ClassVar[Mapping[str, str] | None] = {}

    def infer(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor]) -> Support:
        """Returns k entries per row."""
        return by_rows(top_ids(scores.abs(), self.k))

    def choose(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor], moment: Moment) -> Support:
        """Returns as many entries per row as k is at this step."""
        return by_rows(top_ids(scores.abs(), self.k_at(moment.progress)))

    def activate(
        self, kept: Float[Tensor, "nnz"], ids: Int[Tensor, "nnz"], tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "nnz"]:
        """Returns the pre-activations as they are."""
        return kept
