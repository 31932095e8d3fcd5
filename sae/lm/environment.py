"""What a run ran on: written to env.json so that a result can be traced; no host names, no secrets."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from sae.base.files import typed_command
from sae.parallel import ranks

PACKAGES = ("sae-interp", "torch", "transformers", "datasets", "safetensors", "numpy")


def environment(device: torch.device, **more: Any) -> dict[str, Any]:
    """Returns versions, device, threads, the command that was typed, and more: what the run reads."""
    return {
        **versions(),
        "threads": torch.get_num_threads(),
        "world_size": ranks.world_size(),
        "device": str(device),
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
