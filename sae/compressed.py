"""Compressed sparse rows: row i of a matrix owns entries offsets[i]:offsets[i+1] of its columns and values."""

import torch
from jaxtyping import Int
from torch import Tensor


def offsets_of(counts: Int[Tensor, "n"]) -> Int[Tensor, "n_plus_1"]:
    """Returns where rows of so many entries begin, and the end of the last."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def rows_of(offsets: Int[Tensor, "n_plus_1"]) -> Int[Tensor, "nnz"]:
    """Returns the row of every entry."""
    return torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())
