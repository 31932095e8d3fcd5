"""Long rows in pieces, so that none is a serial tail.

Of a row's entries the first piece is summed by the program of the row; every further one by a program of its own, in a
launch before, beside. The row's program then adds them in their order: sums do not depend on which program ends first,
and there are no atomics. How many further pieces there are, only the device knows: there are as many programs as there
can be, and the rest end at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.cuda.launching import CHUNK, block_of, entries_of, launch, warps_of

PIECE = 512
"""Entries that one program sums at most."""


class Dealt(NamedTuple):
    """The further pieces of rows, those of a row side by side."""

    ends: Int[Tensor, "rows"]
    """How many there are up to and with each row."""
    owners: Int[Tensor, "pieces"]
    """The row of each, of as many as there can be; len(ends) where there is none."""


def deal(counts: Int[Tensor, "rows"], nnz: int) -> Dealt:
    """Returns the further pieces of rows with so many entries, `nnz` of all. The host reads nothing."""
    most = nnz // PIECE
    ends = ((counts - 1).clamp_min_(0) // PIECE).cumsum(0)
    return Dealt(ends, torch.searchsorted(ends, torch.arange(most, device=counts.device), right=True))


def summed_beside(
    dealt: Dealt, starts: Tensor, coefficients: Tensor, index: Tensor, rows: Tensor, ranked: Tensor | None = None
) -> Float[Tensor, "pieces d"]:
    """Returns the sums of coefficients_e rows_{index(e)} over the entries of each further piece, in float32.

    `starts` says where rows' entries begin; `ranked` which rows `dealt` is of, where it is not all in their order.
    """
    most, d = len(dealt.owners), rows.shape[1]
    found = torch.empty(most, d, dtype=torch.float32, device=rows.device)
    block = block_of(d, CHUNK)
    chunks = triton.cdiv(d, block)
    launch(
        _beside, most * chunks, coefficients, index, rows, starts, dealt.ends, dealt.owners, ranked, found, d, chunks,
        len(dealt.ends), ranked is not None, PIECE, entries_of(block), block, num_warps=warps_of(block),
    )  # fmt: skip
    return found


@triton.jit
def weighted_rows(coefficients, index, rows, start, stop, column, d, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the sum over entries start:stop of coefficients_e rows_{index(e)}, in their order, at these columns."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < stop
        row = tl.load(index + entry, mask=inside, other=0).to(tl.int64)
        coefficient = tl.load(coefficients + entry, mask=inside, other=0.0).to(tl.float32)
        held = inside[:, None] & (column < d)[None, :]
        part = tl.load(rows + row[:, None] * d + column[None, :], mask=held, other=0.0).to(tl.float32)
        total += tl.sum(coefficient[:, None] * part, axis=0)
    return total


@triton.jit
def whole_row(
    coefficients, index, rows, start, stop, beside, ends, hot, place, column, d,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns the sum of a row's first piece and of those beside; `place` is where `ends`, of `hot` rows, has it."""
    stop = tl.minimum(stop, start + PIECE)
    total = weighted_rows(coefficients, index, rows, start, stop, column, d, ENTRIES, BLOCK)
    begin = tl.load(ends + place - 1, mask=(place > 0) & (place < hot), other=0)
    end = tl.load(ends + place, mask=place < hot, other=0)
    for piece in range(begin, end):
        total += tl.load(beside + piece * d + column, mask=column < d, other=0.0)
    return total


@triton.jit
def _beside(
    coefficients, index, rows, starts, ends, owners, ranked, found, d, chunks, hot,
    RANKED: tl.constexpr, PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) // chunks).to(tl.int64)
    column = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(owners + number)
    if place < hot:
        row = tl.load(ranked + place).to(tl.int64) if RANKED else place
        before = tl.load(ends + place - 1, mask=place > 0, other=0)
        start = tl.load(starts + row) + (1 + number - before) * PIECE
        stop = tl.minimum(tl.load(starts + row + 1), start + PIECE)
        total = weighted_rows(coefficients, index, rows, start, stop, column, d, ENTRIES, BLOCK)
        tl.store(found + number * d + column, total, mask=column < d)
