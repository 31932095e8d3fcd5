"""Which path computes what: one is chosen for the process, and what it does not take goes to PyTorch's own operators.

    reference    the definition, in plain torch
    torch        the best of PyTorch's own operators, on every device
    native       C++ on the CPU, compiled at first use, in float32
    triton       on an NVIDIA card

Codes of which most entries are there are multiplied densely on every path (`dense.py`).
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.settings import choose
from sae.kernels import reference, segmented

# The share of all entries from which on dense products are faster on two CPU cores; ReLU coders begin at a half.
DENSE_SHARE = 0.3
SPARSE_ON = {"cpu", "cuda"}  # elsewhere, as on Apple's GPUs, PyTorch has not all of the sparse products
PATHS = ("native", "triton", "torch", "reference")
_ONLY_SOME = {"native": "sae.kernels.native", "triton": "sae.kernels.cuda"}  # imported when chosen: they compile
_chosen: tuple[str, ModuleType] = ("torch", segmented)


def missing(path: str) -> str | None:
    """Returns why a path cannot be had here, None if it can; the native one is compiled now if it has not been."""
    if path == "native":
        return import_module(_ONLY_SOME[path]).available()
    if path == "triton":
        return None if torch.cuda.is_available() and find_spec("triton") else "it needs an NVIDIA card and Triton"
    return None


def best(device: torch.device) -> str:
    """Returns the fastest path that can be had on a device."""
    wanted = {"cpu": "native", "cuda": "triton"}.get(device.type, "torch")
    return "torch" if missing(wanted) else wanted


def check(path: str) -> None:
    """Raises ConfigError if there is no path of that name, or if it cannot be had here."""
    choose("kernels", path, PATHS)
    why = missing(path)
    if why:
        raise ConfigError(f"kernels: {path} cannot be had here: {why}")


def use(path: str) -> None:
    """Chooses the path of this process; ConfigError if there is none of that name, or if it cannot be had here."""
    global _chosen
    check(path)
    own = {"reference": reference, "torch": segmented}
    _chosen = path, own[path] if path in own else import_module(_ONLY_SOME[path])


def path() -> str:
    """Returns the name of the path in use."""
    return _chosen[0]


def kernel(name: str, like: Tensor) -> Callable[..., Any]:
    """Returns a function of the contract (`sae/kernels/reference.py`) for tensors like this one."""
    name_of_path, module = _chosen
    if name_of_path in _ONLY_SOME and not module.takes(like):
        module = segmented
    return getattr(module, name)


def densely(offsets: Tensor, ids: Tensor, weight: Tensor) -> bool:
    """Returns whether codes of a weight's latents are better multiplied densely."""
    many = ids.numel() > DENSE_SHARE * (offsets.numel() - 1) * len(weight)
    return many or weight.device.type not in SPARSE_ON
