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

PIECE = 2048  # latents of one product on a CPU: measured, up to a fifth faster than all at once for few tokens


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
        self,
        y: Float[Tensor, "n d_in"],
        tensors: Mapping[str, Tensor],
        blocks: int = 1,
        out: Float[Tensor, "n m"] | None = None,
    ) -> Float[Tensor, "n m"]:
        """Returns those of m latents, given their rows of the tensors; of `blocks`, each sees columns of its own.

        Of one affine map they are written into `out`, if there is one.
        """
        out = out if self.affine else None
        return self.combined(*(affine(y, tensors[w], tensors[b], blocks, out) for w, b in self.maps.items()))

    def preactivations_at(
        self,
        y: Float[Tensor, "n width"],
        tensors: Mapping[str, Tensor],
        offsets: Int[Tensor, "n_plus_1"],
        ids: Int[Tensor, "nnz"],
        known: Float[Tensor, "nnz"] | None = None,
        sink: kernels.Sink | None = None,
    ) -> Float[Tensor, "nnz"]:
        """Returns those at a support, differentiable; `known` are these numbers if they were computed already."""
        known = known if self.affine else None
        parts = []
        for weight, bias in self.maps.items():
            into = sink.of(weight) if sink else None
            parts.append(kernels.encode_at(y, tensors[weight], tensors[bias], offsets, ids, known, into))
        return self.combined(*parts)

    def pursue(
        self, y: Float[Tensor, "n d"], decoder: Float[Tensor, "m d"], rule: Any
    ) -> tuple[Support, Float[Tensor, "nnz"]]:
        """Returns the support and its values, given the selection that has the constants; if it `pursues`."""
        raise NotImplementedError


def affine(
    y: Float[Tensor, "n d_in"],
    weight: Float[Tensor, "m width"],
    bias: Float[Tensor, "m"],
    blocks: int = 1,
    out: Float[Tensor, "n m"] | None = None,
) -> Float[Tensor, "n m"]:
    """Returns y W^T + b, in `out` if there is one; of several equal blocks of rows, each sees its own columns of y."""
    if out is None and blocks == 1:
        return torch.nn.functional.linear(y, weight, bias)
    seen, size = y.view(len(y), blocks, weight.shape[1]), len(weight) // blocks
    out = y.new_empty(len(y), len(weight)) if out is None else out
    piece = PIECE if y.device.type == "cpu" else size
    for block, start in ((b, s) for b in range(blocks) for s in range(0, size, piece)):
        rows = slice(block * size + start, block * size + min(start + piece, size))
        torch.addmm(bias[rows], seen[:, block], weight[rows].T, out=out[:, rows])
    return out


discover(__name__, __path__)
