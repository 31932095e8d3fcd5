"""Encoders: how latents see an input, as pre-activations h = f(y). One a file; `CoderSpec.encoder` is its name.

An encoder has no constants, only tensors with a row for each latent: the affine maps y W^T + b through which it sees
the input, W_enc [d_sae, width] and b_enc [d_sae] always among them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import kernels
from sae.base.plugins import Plugin, discover
from sae.kernels.codes import Support


@dataclass(frozen=True)
class Encoder(Plugin):
    """A way from inputs to pre-activations; as it stands, of one map."""

    maps: ClassVar[Mapping[str, str]] = {"W_enc": "b_enc"}
    """The matrix of every map with its bias. All but W_enc start at 0."""
    scaled: ClassVar[tuple[str, ...] | None] = None
    """The tensors that take a positive factor of pre-activations. None: not known, so no fold may multiply latents."""
    affine: ClassVar[bool] = False
    """Whether pre-activations are what the one map makes of the input."""
    pursues: ClassVar[bool] = False
    """Whether it chooses latents itself, with their values (`pursue`); the selection of its name has its constants."""
    trainable: ClassVar[bool] = True
    """Whether training can use it; others are of coders that are loaded."""

    def combined(self, *mapped: Tensor) -> Tensor:
        """Returns pre-activations from what each map makes of the input, element by element and differentiable."""
        raise NotImplementedError

    def preactivations(
        self, y: Float[Tensor, "n d_in"], tensors: Mapping[str, Tensor], blocks: int = 1
    ) -> Float[Tensor, "n m"]:
        """Returns those of m latents, given their rows of the tensors; of `blocks`, each sees columns of its own."""
        return self.combined(*(affine(y, tensors[w], tensors[b], blocks) for w, b in self.maps.items()))

    def preactivations_at(
        self,
        y: Float[Tensor, "n width"],
        tensors: Mapping[str, Tensor],
        offsets: Int[Tensor, "n_plus_1"],
        ids: Int[Tensor, "nnz"],
        known: Float[Tensor, "nnz"] | None = None,
    ) -> Float[Tensor, "nnz"]:
        """Returns those at a support, differentiable; `known` are these numbers if they were computed already."""
        known = known if self.affine else None
        pairs = self.maps.items()
        return self.combined(*(kernels.encode_at(y, tensors[w], tensors[b], offsets, ids, known) for w, b in pairs))

    def pursue(
        self, y: Float[Tensor, "n d"], decoder: Float[Tensor, "m d"], rule: Any
    ) -> tuple[Support, Float[Tensor, "nnz"]]:
        """Returns the support and its values, given the selection that has the constants; if it `pursues`."""
        raise NotImplementedError


def affine(
    y: Float[Tensor, "n d_in"], weight: Float[Tensor, "m width"], bias: Float[Tensor, "m"], blocks: int = 1
) -> Float[Tensor, "n m"]:
    """Returns y W^T + b; of several equal blocks of rows, each is multiplied with its own columns of y alone."""
    if blocks == 1:
        return torch.nn.functional.linear(y, weight, bias)
    seen = y.view(len(y), blocks, -1).transpose(0, 1)
    product = torch.bmm(seen, weight.view(blocks, -1, weight.shape[1]).transpose(1, 2))
    return product.transpose(0, 1).reshape(len(y), -1) + bias


discover(__name__, __path__)
