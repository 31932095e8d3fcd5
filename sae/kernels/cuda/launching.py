"""How kernels are started, and how rows are cut for them.

What a card asks for and Triton's interpreter does not show: offsets are taken in int64 (an int that fits is passed as
int32, and a product of two of those wraps); a program never reads again what it has written (its threads may hold other
elements then, and nothing makes them wait); a tile of a row fits into registers, by `warps_of` and `entries_of`.
"""

from typing import Any

import torch
import triton
from torch import Tensor

WIDEST = 8192
"""Columns that one program holds at most; wider rows are taken in several."""
CHUNK = 1024
"""Columns of a program that needs no whole row."""


def launch(kernel: Any, programs: int, first: Tensor, *given: Any, **options: Any) -> None:
    """Starts so many programs of a kernel on the device of its first argument."""
    if programs:
        with torch.cuda.device_of(first):
            kernel[(programs,)](first, *given, **options)


def rows_apart(rows: Tensor) -> tuple[Tensor, int]:
    """Returns rows, or one for all, whose entries are contiguous, and how far one lies from the next: 0 of one for all.

    Rows may be an expanded one, which is not copied.
    """
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0) if rows.dim() == 2 else 0


def block_of(columns: int, most: int = WIDEST) -> int:
    """Returns the power of two, 16 to `most`, that holds so many columns, or is `most`."""
    return min(most, max(16, triton.next_power_of_2(columns)))


def warps_of(block: int) -> int:
    """Returns how many warps share a row of a block: 8 to 16 columns a thread."""
    return min(16, max(1, block // 256 if block <= 1024 else block // 512))


def entries_of(block: int) -> int:
    """Returns how many rows of a block are in flight together: about 64 numbers a thread."""
    return min(16, max(1, 2048 * warps_of(block) // block))
