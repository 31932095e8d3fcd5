"""Linear: h = y W_enc^T + b_enc."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import kernels
from sae.encoders import Encoder


@Encoder.register_subclass("linear")
@dataclass(frozen=True)
class Linear(Encoder):
    """An affine map."""

    scaled: ClassVar[tuple[str, ...] | None] = ("W_enc", "b_enc")
    cross_layer: ClassVar[bool] = True

    def preactivations(
        self, y: Float[Tensor, "n d_in"], tensors: Mapping[str, Tensor], blocks: int = 1
    ) -> Float[Tensor, "n m"]:
        """Returns y W^T + b."""
        weight, bias = tensors["W_enc"], tensors["b_enc"]
        if blocks == 1:
            return torch.nn.functional.linear(y, weight, bias)
        seen = y.view(len(y), blocks, -1).transpose(0, 1)
        product = torch.bmm(seen, weight.view(blocks, -1, weight.shape[1]).transpose(1, 2))
        return product.transpose(0, 1).reshape(len(y), -1) + bias

    def preactivations_at(
        self,
        y: Float[Tensor, "n width"],
        tensors: Mapping[str, Tensor],
        offsets: Int[Tensor, "n_plus_1"],
        ids: Int[Tensor, "nnz"],
        known: Float[Tensor, "nnz"] | None = None,
    ) -> Float[Tensor, "nnz"]:
        """Returns the product at the support alone."""
        return kernels.encode_at(y, tensors["W_enc"], tensors["b_enc"], offsets, ids, known)
