"""Tensors times factors, in float32 at least, and whether factors are one."""

import torch
from jaxtyping import Float
from torch import Tensor

ALIKE = 1e-6  # factors nearer than this are one: what float32 leaves of rows that were divided by their norms


def alike(factors: Float[Tensor, "m"], *more: float) -> bool:
    """Returns whether factors, and some more numbers, are one but for rounding."""
    least, most = min(float(factors.min()), *more, torch.inf), max(float(factors.max()), *more, -torch.inf)
    return most - least <= ALIKE * most


def ratio(new: Float[Tensor, "m"], old: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Returns new / old, 1 where old is 0."""
    return torch.where(old > 0, new / old, 1.0)


def exact(tensor: Tensor) -> torch.dtype:
    """Returns the precision of a folded tensor: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def times(tensor: Tensor, factor: Tensor) -> Tensor:
    """Returns a product in the precision of a folded tensor."""
    return tensor.to(exact(tensor)) * factor.to(exact(tensor))
