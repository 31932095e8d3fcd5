"""Which devices a model goes to. A rank has GPUs of its own, and what says numbers of GPUs counts those."""

import atexit
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from sae.base.errors import ConfigError
from sae.base.files import cache_dir, remove_stale, temp_beside
from sae.parallel import ranks

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DEVICE = re.compile(r"(cpu|disk|mps|cuda|xpu|npu)(:\d+)?")
USED = 0.9  # of what is free, as transformers has it: passes need some
MAP, MEMORY, FOLDER = (f"model.kwargs.{name}" for name in ("device_map", "max_memory", "offload_folder"))


def resolve_device(device: str, field: str = "model.device") -> torch.device:
    """Returns the torch device for "auto" or an explicit name; ConfigError if this machine lacks it."""
    if device == "auto":
        apple = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else apple
    if device == "cuda":
        device = f"cuda:{ranks.own_gpus()[0]}"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{field}: {device!r} is not available here ({reason}); try cpu") from error
    return found


def spread(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments of `from_pretrained` that spread a model over the devices of this rank, and no other's.

    `device_map` and `max_memory` number the rank's GPUs from 0. Without `max_memory` a rank takes of the memory that is
    free on its GPUs, and of the host's its part. Weights that have to be written to disk go to a folder that is removed
    when this process ends. ConfigError for a device that is not there, or a folder that cannot be written to.
    """
    found, said = dict(kwargs), kwargs["device_map"]
    if "max_memory" in found:
        found["max_memory"] = {own_device(key, MEMORY): size for key, size in found["max_memory"].items()}
    if isinstance(said, str) and said in MAPS:
        if "max_memory" not in found and (free := own_memory()):
            found["max_memory"] = free
    else:
        parts = said if isinstance(said, Mapping) else {"": said}
        found["device_map"] = {path: own_device(device, MAP) for path, device in parts.items()}
    own = Path(found["offload_folder"]) if "offload_folder" in found else None
    folder = own or _scratch(cache_dir() / "offloaded" / "weights")
    if own and ranks.world_size() > 1:  # they write files of the same names
        folder = own / f"rank-{ranks.rank()}"
    if own or (isinstance(found["device_map"], dict) and "disk" in found["device_map"].values()):
        _check_written(folder, FOLDER if own else "SAE_CACHE")
    return {**found, "offload_folder": str(folder)}


def own_device(said: int | str, field: str) -> int | str:
    """Returns a device of this rank as accelerate calls it, a GPU by its number; ConfigError if it is not there."""
    kind, _, number = str(said).partition(":")
    if kind.isdecimal():
        kind, number = "cuda", kind
    if kind in ("cpu", "disk"):
        return kind
    if kind != "cuda":
        resolve_device(str(said), field)
        return said
    if not torch.cuda.is_available() and torch.accelerator.is_available():  # whose numbers are of another kind
        return said
    there = ranks.own_gpus() if torch.cuda.is_available() else range(0)
    if int(number or 0) < len(there):
        return there[int(number or 0)]
    own = f"GPUs 0 to {len(there) - 1}" if len(there) > 1 else "GPU 0" if there else "no GPU"
    raise ConfigError(f"{field}: {said!r} is not there; this process has {own}, beside cpu and disk")


def own_memory() -> dict[int | str, int]:
    """Returns the bytes that a model may take of each of this rank's devices; none if the host is all its own."""
    sharing, gpus = ranks.on_this_host(), ranks.own_gpus() if torch.cuda.is_available() else range(0)
    if sharing == 1:
        return {}
    free: dict[int | str, float] = {number: torch.cuda.mem_get_info(number)[0] for number in gpus}
    free["cpu"] = psutil.virtual_memory().available / sharing
    return {name: int(USED * size) for name, size in free.items()}


def memory_of_rank(device: torch.device, spread: bool) -> int:
    """Returns the bytes that a rank has: of its GPU, of all of its GPUs if models are spread, or of the host."""
    if device.type == "cuda":
        own = ranks.own_gpus() if spread else [device]
        return sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in own)
    return psutil.virtual_memory().total // ranks.on_this_host()


def _scratch(folder: Path) -> Path:
    """Returns a folder beside it, not made yet, that goes when this process ends; if killed, when another begins."""
    remove_stale(folder.parent)
    own = temp_beside(folder)
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def _check_written(folder: Path, field: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{field}: {folder} cannot be written to: {error.strerror or error}") from error
