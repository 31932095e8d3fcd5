"""GroupMax: the latents fall into k groups of neighbors, and each token keeps the largest of every group, then ReLU.

No token-wide sort is needed, and the k latents that fire together come from different parts of the dictionary. The rule
is sparsify's `groupmax`: group j holds the latents j d_sae / k to (j + 1) d_sae / k - 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.kernels import top_ids
from sae.kernels.codes import Support, by_rows
from sae.selection import Budget, Selection
from sae.selection.topk import TopK

if TYPE_CHECKING:
    from typing import Self


@Selection.register_subclass("groupmax")
@dataclass(frozen=True)
class GroupMax(Selection):
    """Keeps the largest of each of k groups."""

    over: ClassVar[str] = "group"
    units: ClassVar[Mapping[str, str] | None] = {}
    k: int = 32
    """Number of groups, and so of latents kept per token."""

    def validate(self, d_sae: int) -> None:
        """Raises ConfigError unless d_sae latents fall into k equal groups."""
        if not 1 <= self.k <= d_sae or d_sae % self.k:
            raise ConfigError(f"selection.k: {self.k} groups cannot share d_sae = {d_sae} latents equally")

    def shared_by(self, blocks: int) -> "Self":
        """Returns the rule with the groups of all blocks, which stay what they are."""
        return replace(self, k=self.k * blocks)

    @property
    def implied_l0(self) -> int | None:
        """Returns k: one latent of each group."""
        return self.k

    def best_of(self, m: int) -> tuple[int, Budget] | None:
        """Returns the size of a group, and the rule for the best one."""
        return m // self.k, TopK(1)

    def unit(self, m: int) -> int | None:
        """Returns the size of a group."""
        return m // self.k

    def within(self, held: int, m: int) -> "Self":
        """Returns the rule with the groups that a rank holds."""
        return replace(self, k=held * self.k // m)

    def infer(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor]) -> Support:
        """Returns k entries per row."""
        size = scores.shape[1] // self.k
        best = top_ids(scores.reshape(-1, size), 1).reshape(-1, self.k)
        return by_rows(best + size * torch.arange(self.k, device=scores.device))
