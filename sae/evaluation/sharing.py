"""The passes of an evaluation over ranks: each measures its share, and the sums of all are put together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sae.parallel import agreement, collectives
from sae.parallel.ranks import ALONE, Share


class Sharing:
    """How passes are shared. Alone, nothing is said to anybody; otherwise all ranks go through all of it alike.

    A pass is the same whoever makes it, and every rank comes to the same figures. They are those of one process but for
    the order in which float64 sums are taken.
    """

    def __init__(self, share: Share = ALONE) -> None:
        self.share, self.alone = share, share.world_size == 1

    @property
    def shows(self) -> bool:
        """Returns whether this rank shows its progress."""
        return self.share.rank == 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Guards this rank's passes: an error, or a stop, of one rank ends all when they have made theirs."""
        if self.alone:
            yield
        else:
            with agreement.together():
                yield

    def add_up(self, sums: list[Tensor]) -> None:
        """Replaces sums of this rank by those of all."""
        if not self.alone:
            collectives.total_(*sums)

    def in_order(self, rows: Tensor) -> Tensor:
        """Returns what all ranks have measured, in the order of the passes."""
        return rows if self.alone else collectives.gathered(rows)[0]

    def of_first(self, rows: list[Tensor], measure: Callable[..., Any]) -> Any:
        """Returns what rank 0 makes of such rows of all ranks, plain JSON values: only it has room for them to have."""
        if self.alone:
            return measure(*rows)
        whole = [collectives.collected(part) for part in rows]
        return agreement.agreed(lambda: measure(*whole))


def joined(parts: list[Tensor], width: int | None = None) -> Tensor:
    """Returns float32 rows one after the other, of which there may be none."""
    return torch.cat([torch.zeros(0, *(() if width is None else (width,))), *parts])
