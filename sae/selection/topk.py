"""TopK: each token keeps its k largest pre-activations, then ReLU (Gao 2024, arXiv 2406.04093, equation 2).

    a = ReLU(TopK_k(W_enc (x - b_dec) + b_enc))

Exactly k entries are kept per token; those that are not positive become 0 and do not count as fired.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.kernels import top_ids
from sae.kernels.codes import Support, by_rows
from sae.selection import Budget, Moment, Selection


@Selection.register_subclass("topk")
@dataclass(frozen=True)
class TopK(Budget):
    """Keeps the k largest of every token."""

    ranks: ClassVar[bool] = True
    units: ClassVar[Mapping[str, str] | None] = {}

    def infer(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor]) -> Support:
        """Returns k entries per row."""
        return by_rows(top_ids(self.rank(scores), self.k))

    def choose(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor], moment: Moment) -> Support:
        """Returns as many entries per row as k is at this step."""
        return by_rows(top_ids(self.rank(scores), self.k_at(moment.progress)))
