"""Which path computes what: one is chosen for the process, and each function falls back to the next simpler one.

reference    the definition, in plain torch
segmented    the best of PyTorch's own operators, on every device
dense        by dense products, where most entries are there
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from sae.base.settings import choose
from sae.kernels import reference, segmented

# The share of all entries from which on dense products are faster on two CPU cores; ReLU coders begin at a half.
DENSE_SHARE = 0.3
SPARSE_ON = {"cpu", "cuda"}  # elsewhere, as on Apple's GPUs, PyTorch has not all of the sparse products
PATHS: dict[str, ModuleType] = {"torch": segmented, "reference": reference}
_chosen = "torch"


def use(path: str) -> None:
    """Chooses the path of this process: torch or reference. ConfigError names any other."""
    global _chosen
    choose("kernels", path, tuple(PATHS))
    _chosen = path


def path() -> str:
    """Returns the name of the path in use."""
    return _chosen


def kernel(name: str, like: Tensor) -> Callable[..., Any]:
    """Returns a function of the contract (`sae/kernels/reference.py`) for tensors like this one."""
    return getattr(PATHS[_chosen], name)


def densely(offsets: Tensor, ids: Tensor, weight: Tensor) -> bool:
    """Returns whether codes of a weight's latents are better multiplied densely."""
    many = ids.numel() > DENSE_SHARE * (offsets.numel() - 1) * len(weight)
    return many or weight.device.type not in SPARSE_ON
