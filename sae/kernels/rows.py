"""Compressed rows: row i of a matrix owns entries offsets[i]:offsets[i+1] of what is listed row after row."""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def offsets_of(counts: Int[Tensor, "n"]) -> Int[Tensor, "n_plus_1"]:
    """Returns where rows of so many entries begin, and the end of the last."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def counted(places: Int[Tensor, "nnz"], m: int) -> Int[Tensor, "m"]:
    """Returns how often each of m numbers occurs: `bincount`, for which the device is not waited for."""
    return torch.zeros(m, dtype=torch.long, device=places.device).scatter_add_(0, places, torch.ones_like(places))


def rows_of(offsets: Int[Tensor, "n_plus_1"], nnz: int | None = None) -> Int[Tensor, "nnz"]:
    """Returns the row of every entry; where their number is given, the device is not waited for."""
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=nnz)


def flat(offsets: Int[Tensor, "n_plus_1"], columns: Int[Tensor, "nnz"], m: int) -> Int[Tensor, "nnz"]:
    """Returns where every entry lies in the matrix of m columns, flattened.

    Reading and writing there, with `index_select`, is faster on a CPU than by row and column, and so is its gradient.
    """
    begins = torch.arange(0, m * (offsets.numel() - 1), m, device=offsets.device)
    return torch.repeat_interleave(begins, offsets.diff(), output_size=columns.numel()).add_(columns)


def joined(
    parts: list[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Int[Tensor, "n_plus_1"], Int[Tensor, "nnz"], Shaped[Tensor, "nnz"]]:
    """Returns (row offsets, columns, values) of matrices side by side, given those of each; columns count on."""
    counts = torch.stack([offsets.diff() for offsets, _, _ in parts])
    offsets = offsets_of(counts.sum(0))
    begins = offsets[:-1] + counts.cumsum(0) - counts
    columns = torch.empty(sum(len(part[1]) for part in parts), dtype=torch.long, device=offsets.device)
    values = columns.new_empty(len(columns), dtype=parts[0][2].dtype)
    for begin, (starts, own, known) in zip(begins, parts, strict=True):
        places = torch.repeat_interleave(begin - starts[:-1], starts.diff(), output_size=len(own))
        places += torch.arange(len(own), device=own.device)
        columns[places], values[places] = own, known
    return offsets, columns, values


def entries_of(
    offsets: Int[Tensor, "n_plus_1"], rows: Int[Tensor, "r"]
) -> tuple[Int[Tensor, "r_plus_1"], Int[Tensor, "picked"]]:
    """Returns (offsets, entries) of some rows, in the order in which they are named."""
    picked = offsets_of(offsets.diff()[rows])
    shifts = torch.repeat_interleave(offsets[:-1][rows] - picked[:-1], picked.diff())
    return picked, shifts + torch.arange(len(shifts), device=shifts.device)
