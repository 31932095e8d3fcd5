"""One step of Adam, as all weights of a coder take it: its constants, and what the device alone knows of it."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor


class Update(NamedTuple):
    """What the `adam` of every path is told beside the tensors that it changes."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    step: Float[Tensor, ""]
    """Its number, from 1, in float32."""
    scale: Float[Tensor, ""]
    """What gradients are multiplied by."""
    applies: Bool[Tensor, ""]
    """Whether it is taken; if not, nothing changes."""
