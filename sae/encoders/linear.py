"""Linear: h = y W_enc^T + b_enc."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sae.encoders import Encoder


@Encoder.register_subclass("linear")
@dataclass(frozen=True)
class Linear(Encoder):
    """An affine map."""

    scaled: ClassVar[tuple[str, ...] | None] = ("W_enc", "b_enc")
    affine: ClassVar[bool] = True

    def combined(self, *mapped: Tensor) -> Tensor:
        """Returns what the map makes."""
        return mapped[0]
