"""Where a coder's latents are to lie: `device_map` of `sae.load`.

    "cuda:1", 1, {"": 1}        all on one device
    "disk"                      none in memory: rows are read from the file when they are needed
    ["cuda:0", "cuda:1"]        equal shares of them
    {"cuda:0": 0.6, "cpu": 0.3, "disk": 0.1}    these shares, in this order
    "auto"                      on the GPU with the most free memory, if it has room for them; else on all GPUs by their
                                free memory, and the rest on disk. Without GPU, in memory if there is room

What is on disk is computed with on the first device named, or on `device`; there inputs, codes and outputs are.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psutil
import torch

from sae.base.errors import ConfigError
from sae.coder.parts import DISK
from sae.lm.devices import resolve_device

AUTO = "auto"
FREE = 0.9  # of free memory, that weights may take
NEAR = 1e-6
ALLOWED = "a device, auto, disk, a list of devices, or {device: share} with shares that sum to 1"


class Placing(NamedTuple):
    """Shares of a coder's latents by device, in order."""

    shares: tuple[tuple[torch.device | None, float], ...]
    """The device is None for those on disk."""
    device: torch.device
    """Of inputs, codes and outputs."""

    @property
    def whole(self) -> torch.device | None:
        """Returns the one device on which all latents are, None if they lie in parts."""
        return self.shares[0][0] if len(self.shares) == 1 else None


def placing(device_map: Any, device: str | torch.device | None, size: int = 0) -> Placing:
    """Returns where a coder whose matrices take `size` bytes is to lie; ConfigError says what a map may be.

    `device` is of inputs and outputs; by default the map's first, or the CPU.
    """
    main = None if device is None else resolve_device(str(device), "device")
    if device_map == AUTO:
        shares = _by_room(size)
    elif isinstance(device_map, Mapping):
        shares = _by_mapping(device_map)
    elif isinstance(device_map, Sequence) and not isinstance(device_map, str):
        shares = [(_device(one), 1 / len(device_map)) for one in device_map]
    else:
        shares = [(_device(device_map), 1.0)]
    found = [one for one, _ in shares]
    twice = next((one for i, one in enumerate(found) if one in found[:i]), "")
    if twice != "":
        raise ConfigError(f"device_map: {twice or DISK} is named twice; give it one share")
    total = sum(share for _, share in shares)
    if not shares or abs(total - 1) > NEAR or any(share <= 0 for _, share in shares):
        said = ", ".join(f"{one or DISK} {share:g}" for one, share in shares) or "nothing"
        raise ConfigError(f"device_map: {said} sum to {total:g}; shares must be above 0 and sum to 1")
    first = next((one for one in found if one is not None), torch.device("cpu"))
    placed = Placing(tuple(shares), first if main is None else main)
    if main is not None and placed.whole not in (None, main):
        raise ConfigError(f"device: {device} and device_map: {device_map} are two answers to one question; give one")
    return placed


def _by_mapping(said: Mapping[Any, Any]) -> list[tuple[torch.device | None, float]]:
    """Returns the shares of a mapping, or the one device that a map of `accelerate` from modules means."""
    if said and all(isinstance(share, int | float) for share in said.values()) and "" not in said:
        return [(_device(name), float(share)) for name, share in said.items()]
    if len(set(said.values())) != 1:
        raise ConfigError(f"device_map: {said} is of modules, but it is latents that are dealt out; allowed: {ALLOWED}")
    return [(_device(next(iter(said.values()))), 1.0)]


def _device(name: Any) -> torch.device | None:
    if isinstance(name, bool) or not isinstance(name, str | int | torch.device):
        raise ConfigError(f"device_map: {name!r} is no device; allowed: {ALLOWED}")
    if name == DISK:
        return None
    return resolve_device(f"cuda:{name}" if isinstance(name, int) else str(name), "device_map")


def _by_room(size: int) -> list[tuple[torch.device | None, float]]:
    """Returns the shares that there is room for."""
    room = {torch.device("cuda", i): FREE * torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    if not room:
        fits = size <= FREE * psutil.virtual_memory().available
        return [(resolve_device(AUTO, "device_map") if fits else None, 1.0)]
    best = max(room, key=lambda one: room[one])
    if room[best] >= size:
        return [(best, 1.0)]
    shares: list[tuple[torch.device | None, float]] = []
    for one, bytes_there in room.items():
        left = 1 - sum(share for _, share in shares)
        own = min(left, bytes_there / max(size, sum(room.values())))
        shares += [(one, own)] if own > 0 else []
    left = 1 - sum(share for _, share in shares)
    return shares + ([(None, left)] if left > NEAR else [])
