"""Bytes that are held at once: of a computation on shapes alone, and of phases that follow one another in a process."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae.base.memory import KEPT, LARGEST


@dataclass(frozen=True)
class Held:
    """Bytes that are held at once: in blocks that a process keeps when they are freed, and in larger ones."""

    kept: float = 0
    returned: float = 0

    @property
    def total(self) -> float:
        """Returns all of them."""
        return self.kept + self.returned

    def __add__(self, other: "Held") -> "Held":
        return Held(self.kept + other.kept, self.returned + other.returned)


def blocks(size: float, count: float = 1) -> Held:
    """Returns `count` blocks of `size` bytes each."""
    return Held(size * count) if size < LARGEST else Held(0, size * count)


def peak(phases: Iterable[Held]) -> float:
    """Returns the most bytes that a process has of the system, in phases one after the other.

    What it keeps is used again; where a phase needs fewer small blocks than one before it, they stand empty.
    """
    kept, most = 0.0, 0.0
    for phase in phases:
        kept = max(phase.kept, min(kept, phase.kept + KEPT))
        most = max(most, kept + phase.returned)
    return most


class Live(TorchDispatchMode):
    """Adds up what a computation holds at its worst, by the sizes of its tensors: fake ones will do.

    Not what was there before, nor what operations need inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0  # of all in `live`, those included that have gone since it was looked through
        self.worst = Held()
        self.most = 0  # of `worst`

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before: set[int] | None = None
        for one in tree_leaves(made):
            if not _strided(one):
                continue
            if before is None:
                before = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if _strided(each)}
            storage = one.untyped_storage()
            if storage._cdata not in before:
                self._add(storage)
        if self.bytes > self.most:
            self._look()
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage; one that was counted at its address is either the same or gone."""
        gone = self.live.pop(storage._cdata, None)
        size = storage.nbytes()
        self.live[storage._cdata] = StorageWeakRef(storage), size
        self.bytes += size - (gone[1] if gone else 0)

    def _look(self) -> None:
        """Leaves out what has gone, and keeps what is held if nothing was worse."""
        expired = torch.UntypedStorage._expired  # type: ignore[attr-defined]
        self.live = {key: found for key, found in self.live.items() if not expired(found[0].cdata)}
        sizes = [size for _, size in self.live.values()]
        self.bytes = sum(sizes)
        if self.bytes > self.most:
            self.most = self.bytes
            returned = sum(size for size in sizes if blocks(size).returned)
            self.worst = Held(self.bytes - returned, returned)


def _strided(one: Any) -> bool:
    return isinstance(one, torch.Tensor) and one.layout == torch.strided
