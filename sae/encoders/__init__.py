"""Encoders: how latents see an input, as pre-activations h = f(y). One a file; `CoderSpec.encoder` is its name.

An encoder has no constants, only tensors with a row for each latent; W_enc [d_sae, width] and b_enc [d_sae] are always
among them. What it does not say of itself is taken to be so in the careful way: a fold is refused, and pre-activations
at a support are picked out of all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from sae.base.plugins import Plugin, discover
from sae.kernels.codes import Support, flat


@dataclass(frozen=True)
class Encoder(Plugin):
    """A way from inputs to pre-activations."""

    maps: ClassVar[Mapping[str, str]] = {"W_enc": "b_enc"}
    """The matrices through which alone it sees the input, each with its bias. All but W_enc start at 0."""
    scaled: ClassVar[tuple[str, ...] | None] = None
    """The tensors that take a positive factor of pre-activations. None: not known, so no fold may multiply latents."""
    cross_layer: ClassVar[bool] = False
    """Whether it takes inputs of several blocks side by side, each seen by the latents of its own alone."""
    pursues: ClassVar[bool] = False
    """Whether it chooses latents itself, with their values (`pursue`); the selection of its name has its constants."""
    trainable: ClassVar[bool] = True
    """Whether training can use it; others are of coders that are loaded."""

    def shapes(self, d_sae: int, width: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of its tensors, of latents that see `width` inputs."""
        pairs = self.maps.items()
        return {name: shape for w, b in pairs for name, shape in ((w, (d_sae, width)), (b, (d_sae,)))}

    def preactivations(
        self, y: Float[Tensor, "n d_in"], tensors: Mapping[str, Tensor], blocks: int = 1
    ) -> Float[Tensor, "n m"]:
        """Returns those of m latents, given their rows of the tensors; of equal `blocks`, if it takes several."""
        raise NotImplementedError

    def preactivations_at(
        self,
        y: Float[Tensor, "n width"],
        tensors: Mapping[str, Tensor],
        offsets: Int[Tensor, "n_plus_1"],
        ids: Int[Tensor, "nnz"],
        known: Float[Tensor, "nnz"] | None = None,
    ) -> Float[Tensor, "nnz"]:
        """Returns pre-activations at a support, differentiable in inputs and tensors.

        `known` are these numbers where they were computed already, without gradient.
        """
        scores = self.preactivations(y, tensors)
        return scores.reshape(-1).index_select(0, flat(offsets, ids, scores.shape[1]))

    def pursue(
        self, y: Float[Tensor, "n d"], decoder: Float[Tensor, "m d"], rule: Any
    ) -> tuple[Support, Float[Tensor, "nnz"]]:
        """Returns the support and its values, given the selection that has the constants; if it `pursues`."""
        raise NotImplementedError


discover(__name__, __path__)
