"""Sparse autoencoders and transcoders: train, evaluate, diagnose, load.

    coder = sae.load("runs/quickstart")
    z = coder.encode(x)                  # SparseLatents
    out, latents = coder(x)

Names are imported when first used, so that `import sae` is quick.
"""

from typing import TYPE_CHECKING

from sae.base.lazy import on_demand, supply

if TYPE_CHECKING:
    from sae.coder.coder import SparseCoder
    from sae.coder.splicing import splice
    from sae.evaluation.activations import activations
    from sae.evaluation.doctor import diagnose
    from sae.evaluation.evaluation import evaluate
    from sae.evaluation.tables import to_pandas
    from sae.lm.models import load_language_model
    from sae.loading.hub import load, load_all, save
    from sae.loading.releases import list_released
    from sae.loading.saelens import as_saelens
    from sae.steering.steer import steer
    from sae.training.callbacks import Callback, StopTraining
    from sae.training.config import TrainConfig
    from sae.training.history import history
    from sae.training.run import train
    from sae.training.storing import store_activations

    __version__: str

_HOMES = {
    "Callback": "sae.training.callbacks",
    "SparseCoder": "sae.coder.coder",
    "StopTraining": "sae.training.callbacks",
    "TrainConfig": "sae.training.config",
    "activations": "sae.evaluation.activations",
    "as_saelens": "sae.loading.saelens",
    "diagnose": "sae.evaluation.doctor",
    "evaluate": "sae.evaluation.evaluation",
    "history": "sae.training.history",
    "list_released": "sae.loading.releases",
    "load": "sae.loading.hub",
    "load_all": "sae.loading.hub",
    "load_language_model": "sae.lm.models",
    "save": "sae.loading.hub",
    "splice": "sae.coder.splicing",
    "steer": "sae.steering.steer",
    "store_activations": "sae.training.storing",
    "to_pandas": "sae.evaluation.tables",
    "train": "sae.training.run",
}

__all__ = [
    "Callback",
    "SparseCoder",
    "StopTraining",
    "TrainConfig",
    "__version__",
    "activations",
    "as_saelens",
    "diagnose",
    "evaluate",
    "history",
    "list_released",
    "load",
    "load_all",
    "load_language_model",
    "save",
    "splice",
    "steer",
    "store_activations",
    "to_pandas",
    "train",
]

supply("coders by name", "sae.loading.published")
__getattr__, __dir__ = on_demand(__name__, _HOMES)
