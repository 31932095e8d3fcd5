"""Coders by name: load one from a folder, save one to a folder."""

from pathlib import Path

import torch

from sae.coder import SparseCoder
from sae.errors import ConfigError, DataError, nearest
from sae.formats import native


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SparseCoder:
    """Returns the coder saved in a folder, or the single coder of a training run's folder.

    Raises ConfigError if there is none (naming those below it) and DataError naming a tensor that is missing, of the
    wrong shape, unknown, or not finite.
    """
    folder = _coder_folder(Path(path).expanduser())
    spec, tensors = native.read(folder)
    coder = SparseCoder(spec, device, dtype)
    expected = {name: tuple(parameter.shape) for name, parameter in coder.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise DataError(f"{folder}: tensor {name} is missing.{nearest(name, tensors)}")
        if tuple(tensors[name].shape) != shape:
            raise DataError(f"{folder}: tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
    for name, tensor in tensors.items():
        if name not in expected:
            raise DataError(f"{folder}: tensor {name} is not part of this coder.{nearest(name, expected)}")
        if not torch.isfinite(tensor).all():
            raise DataError(f"{folder}: tensor {name} holds NaN or Inf")
    coder.load_state_dict(tensors)
    return coder.requires_grad_(False)


def save(coder: SparseCoder, folder: str | Path) -> None:
    """Writes a coder to a folder that `load` reads back bit for bit."""
    native.write(Path(folder).expanduser(), coder.spec, coder.state_dict())


def coder_folders(path: Path) -> list[Path]:
    """Returns the folders at or below `path` that hold a coder."""
    return sorted(p.parent for p in path.rglob(native.CONFIG) if native.detect(p.parent))


def _coder_folder(path: Path) -> Path:
    if native.detect(path):
        return path
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"path: no such folder: {path}.{nearest(path.name, siblings)}")
    below = coder_folders(path)
    if len(below) == 1:
        return below[0]
    found = (
        f"it holds {len(below)}: {', '.join(str(p.relative_to(path)) for p in below[:6])}" if below else "found none"
    )
    raise ConfigError(f"path: {path} is not the folder of one coder; {found}")
