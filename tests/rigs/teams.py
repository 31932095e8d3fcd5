"""Ranks that are threads of this process: real groups of gloo, without the seconds that a process takes to start."""

import sys
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from sae.parallel.mesh import Mesh, Shape
from sae.parallel.ranks import ITSELF, Axis

T = TypeVar("T")
PATIENCE = timedelta(seconds=60)


def together(shape: Shape, work: Callable[[Mesh], T]) -> list[T]:
    """Returns what every rank of a mesh comes to; a rank that fails, or one that waits in vain, fails the test."""
    n = shape.sites * shape.data * shape.latents
    store, found, faults = dist.HashStore(), dict[int, T](), list[BaseException]()

    def run(rank: int) -> None:
        try:
            found[rank] = work(_mesh(shape, rank, store))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        thread.join(PATIENCE.total_seconds() + 10)
        assert not thread.is_alive(), f"rank {rank} of {shape} hangs at\n{_where(thread)}"
    if faults:
        raise faults[0]
    return [found[rank] for rank in range(n)]


def _where(thread: threading.Thread) -> str:
    """Returns what a thread is in, the collective last."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)[-6:])


def pretended(shape: Shape) -> list[Mesh]:
    """Returns the place of every rank of a mesh, for what asks no other rank."""
    return [_mesh(shape, rank, None) for rank in range(shape.sites * shape.data * shape.latents)]


def _mesh(shape: Shape, rank: int, store: dist.HashStore | None) -> Mesh:
    site, row, column = shape.place(rank)
    team = row * shape.latents + column
    return Mesh(
        _axis(store, f"sites {row} {column}", site, shape.sites),
        _axis(store, f"data {site} {column}", row, shape.data),
        _axis(store, f"latents {site} {row}", column, shape.latents),
        _axis(store, f"team {site}", team, shape.data * shape.latents),
    )


def _axis(store: dist.HashStore | None, name: str, rank: int, n: int) -> Axis:
    if n == 1:
        return ITSELF
    if store is None:
        return Axis(rank, n, dist.ProcessGroup(rank, n))  # type: ignore[attr-defined]
    own = dist.PrefixStore(name, store)
    group, backend = dist.ProcessGroup(own, rank, n), dist.ProcessGroupGloo(own, rank, n, PATIENCE)  # type: ignore[attr-defined]
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)  # type: ignore[attr-defined]
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)  # type: ignore[attr-defined]
    return Axis(rank, n, group)
