"""Sparse autoencoders and transcoders: train, evaluate, load.

    coder = sae.load("runs/quickstart")
    z = coder.encode(x)                  # SparseLatents
    out, latents = coder(x)

Names are imported when first used, so that `import sae` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.coder import SparseCoder
    from sae.config import TrainConfig
    from sae.evaluation import evaluate
    from sae.hub import load, load_all, save
    from sae.intervene import splice
    from sae.models import load_language_model
    from sae.released.releases import list_released
    from sae.training import train

_HOMES = {
    "SparseCoder": "sae.coder",
    "TrainConfig": "sae.config",
    "evaluate": "sae.evaluation",
    "list_released": "sae.released.releases",
    "load": "sae.hub",
    "load_all": "sae.hub",
    "load_language_model": "sae.models",
    "save": "sae.hub",
    "splice": "sae.intervene",
    "train": "sae.training",
}

__all__ = [
    "SparseCoder",
    "TrainConfig",
    "evaluate",
    "list_released",
    "load",
    "load_all",
    "load_language_model",
    "save",
    "splice",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
