"""What a run ran on: written to env.json so that a result can be traced; no host names, no secrets."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from sae.base.files import typed_command
from sae.lm.models import LanguageModel
from sae.parallel import collectives

PACKAGES = ("sae-interp", "torch", "transformers", "datasets", "safetensors", "numpy")


def environment(lm: LanguageModel, **more: Any) -> dict[str, Any]:
    """Returns versions, device, threads, the model's fingerprint and the command that was typed."""
    return {
        **versions(),
        "threads": torch.get_num_threads(),
        "world_size": collectives.world_size(),
        "device": str(lm.device),
        "model": lm.fingerprint(),
        **more,
    }


def versions() -> dict[str, Any]:
    """Returns versions and the command that was typed."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": {name: version(name) for name in PACKAGES},
        "command": typed_command(),
    }
