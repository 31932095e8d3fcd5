"""This toolkit's own format: a folder with `cfg.json` (the spec) and `sae.safetensors` (tensors as in spec.py)."""

from pathlib import Path

import torch
from torch import Tensor

from sae.errors import DataError
from sae.files import load_tensors, read_json, save_tensors, write_json
from sae.spec import CoderSpec

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def detect(folder: Path) -> bool:
    """Returns whether `folder` holds a coder in this format."""
    return (
        (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file() and "format_version" in read_json(folder / CONFIG)
    )


def read(folder: Path) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors); DataError names a file or tensor that is damaged."""
    return CoderSpec.from_json(read_json(folder / CONFIG)), load_tensors(folder / WEIGHTS)


def write(folder: Path, spec: CoderSpec, tensors: dict[str, Tensor]) -> None:
    """Writes a coder; weights first, so that a folder with a config is whole."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"{name}: holds NaN or Inf; not saved to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
    write_json(folder / CONFIG, spec.to_json())
