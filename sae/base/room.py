"""Room on disks, looked at before long work rather than found wanting at its end."""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from sae.base.errors import ConfigError
from sae.base.units import data_size


class Need(NamedTuple):
    """What work will write."""

    field: str
    """The setting that says where."""
    folder: Path
    size: float
    """Bytes."""


def check_room(*needs: Need) -> None:
    """Raises ConfigError, naming the settings, if a file system has less free than is needed on it in all."""
    found = shortage(*needs)
    if found:
        raise ConfigError(f"{found}; make room, or choose another folder")


def shortage(*needs: Need) -> str:
    """Returns what `check_room` would tell, or "" if there is room."""
    by_disk: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        if need.size > 0:
            by_disk[existing(need.folder).stat().st_dev].append(need)
    for found in by_disk.values():
        place, needed = existing(found[0].folder), sum(need.size for need in found)
        free = shutil.disk_usage(place).free  # of what a user may take, and within a quota that the system tells
        if needed > free:
            fields = " and ".join(dict.fromkeys(need.field for need in found))
            return f"{fields}: {data_size(needed)} of disk are needed, {data_size(free)} are free at {place}"
    return ""


def existing(folder: Path) -> Path:
    """Returns a folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def taken(folder: Path) -> int:
    """Returns how many bytes lie in a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
