"""GLU: each pre-activation times a gate of its own, as in OpenMOSS' coders.

h = (y W_enc^T + b_enc) sigmoid(y W_glu^T + b_glu)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import kernels
from sae.encoders import Encoder


@Encoder.register_subclass("glu")
@dataclass(frozen=True)
class GLU(Encoder):
    """An affine map with a sigmoid gate."""

    maps: ClassVar[Mapping[str, str]] = {"W_enc": "b_enc", "W_glu": "b_glu"}
    scaled: ClassVar[tuple[str, ...] | None] = ("W_enc", "b_enc")

    def preactivations(
        self, y: Float[Tensor, "n d_in"], tensors: Mapping[str, Tensor], blocks: int = 1
    ) -> Float[Tensor, "n m"]:
        """Returns the product of both maps."""
        gates = torch.nn.functional.linear(y, tensors["W_glu"], tensors["b_glu"]).sigmoid()
        return torch.nn.functional.linear(y, tensors["W_enc"], tensors["b_enc"]) * gates

    def preactivations_at(
        self,
        y: Float[Tensor, "n width"],
        tensors: Mapping[str, Tensor],
        offsets: Int[Tensor, "n_plus_1"],
        ids: Int[Tensor, "nnz"],
        known: Float[Tensor, "nnz"] | None = None,
    ) -> Float[Tensor, "nnz"]:
        """Returns the product of both maps at the support alone."""
        gates = kernels.encode_at(y, tensors["W_glu"], tensors["b_glu"], offsets, ids).sigmoid()
        return kernels.encode_at(y, tensors["W_enc"], tensors["b_enc"], offsets, ids) * gates
