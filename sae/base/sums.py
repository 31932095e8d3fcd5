"""Where sums are taken in float64: where what is summed lies, or on the CPU if its device has no such numbers."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}


def summed_on(device: torch.device) -> torch.device:
    """Returns where float64 sums of a device's tensors lie."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def in_float64(x: Tensor) -> Tensor:
    """Returns a tensor in float64."""
    return x.to(summed_on(x.device)).double()
