"""Selection: which latents of a token stay. One rule a file; a rule is a frozen config that builds its working form."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.plugins import Plugin, discover


@dataclass(frozen=True)
class Selection(Plugin):
    """A sparsifying rule. Subclasses add their constants as fields and say how they choose.

    `support` returns which entries of the scores are kept, `activate` what the kept pre-activations become.
    Ties go to the lower latent id, so a support is a function of the scores alone.
    """

    def validate(self, d_sae: int) -> None:
        """Raises ConfigError if a constant does not fit a coder of `d_sae` latents."""

    def support(self, scores: Float[Tensor, "n d_sae"]) -> tuple[Int[Tensor, "n_plus_1"], Int[Tensor, "nnz"]]:
        """Returns (row offsets, latent ids) of the kept entries."""
        raise NotImplementedError

    def activate(self, kept: Float[Tensor, "nnz"]) -> Float[Tensor, "nnz"]:
        """Returns the latents' values from their pre-activations at the support."""
        return torch.relu(kept)


discover(__name__, __path__)
