"""GLU: h = (y W_enc^T + b_enc) sigmoid(y W_glu^T + b_glu), as in OpenMOSS' coders."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sae.encoders import Encoder


@Encoder.register_subclass("glu")
@dataclass(frozen=True)
class GLU(Encoder):
    """An affine map with a gate."""

    maps: ClassVar[Mapping[str, str]] = {"W_enc": "b_enc", "W_glu": "b_glu"}
    scaled: ClassVar[tuple[str, ...] | None] = ("W_enc", "b_enc")

    def combined(self, *mapped: Tensor) -> Tensor:
        """Returns the product with the gates."""
        return mapped[0] * mapped[1].sigmoid()
