"""From one format to another: written, read back, and compared before it is called done."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sae.base.errors import ConfigError, DataError, nearest
from sae.base.room import Need, check_room
from sae.coder.coder import SparseCoder
from sae.coder.parts import CoderInParts
from sae.formats import NATIVE, formats
from sae.loading.hub import load

TOKENS, SAME = 64, 1e-3  # of the comparison: its random inputs, and the largest relative difference of outputs


def writers() -> dict[str, Callable[[Path, SparseCoder], Any]]:
    """Returns {format: its `write`} of the formats that can be written."""
    return {name: module.write for name, module in formats().items() if hasattr(module, "write")}


def convert(coder: SparseCoder, name: str, folder: str | Path) -> list[str]:
    """Writes a coder in a format to a folder that is new or empty; returns the fields of its spec that are not kept.

    A field that is said in another way, such as a scale folded into the weights, counts as not kept; the map is the
    same. ConfigError if the format is unknown or cannot say what the coder is, naming it, or if the folder is in use;
    DataError if what is read back is another map. Then nothing is left.
    """
    if name not in writers():
        raise ConfigError(f"format: {name!r} is not one of {', '.join(writers())}.{nearest(name, writers())}")
    folder = Path(folder).expanduser()
    new = not folder.exists()
    if not new and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"folder: {folder} exists and is not empty; choose another")
    check_room(Need("folder", folder, sum(tensor.nbytes for tensor in coder.state_dict().values())))
    try:
        writers()[name](folder, coder)
        where = "disk" if isinstance(coder, CoderInParts) else None  # what is too large for memory stays there
        return _changed(coder, load(folder, format=name, device_map=where), exact=name == NATIVE)
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _changed(coder: SparseCoder, again: SparseCoder, exact: bool) -> list[str]:
    """Returns the fields of the spec that differ; DataError if the map does."""
    old, new = coder.spec.to_json(), again.spec.to_json()
    if not exact:  # as it is with equal tensors
        x = torch.randn(TOKENS, coder.spec.d_in, generator=torch.Generator().manual_seed(0))
        a, b = coder(x).out.cpu().double(), again(x).out.cpu().double()
        error = float(((a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-12)).median())  # a tie may fall otherwise
        if not error <= SAME:
            raise DataError(f"what was written is another map: outputs differ by {error:.2g} of their norm")
    return [field for field in old if old[field] != new[field]]
