"""ReLU: every positive pre-activation stays; a penalty such as `l1` makes them few (Cunningham 2023, 2309.08600).

a = ReLU(W_enc (x - b_dec) + b_enc)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.codes import Support, where
from sae.selection import Selection


@Selection.register_subclass("relu")
@dataclass(frozen=True)
class ReLU(Selection):
    """Keeps what is positive."""

    over: ClassVar[str] = "nothing"
    needs: ClassVar[tuple[tuple[str, ...], ...]] = (("l1", "tanh"),)
    keeps_positive: ClassVar[bool] = True
    units: ClassVar[Mapping[str, str] | None] = {}

    def infer(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor]) -> Support:
        """Returns the positive entries."""
        return where(scores > 0)

    def cuts(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "m_or_1"] | None:
        """Returns 0."""
        return torch.zeros(1)
