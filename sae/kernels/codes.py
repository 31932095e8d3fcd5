"""Compressed sparse rows: row i of a matrix owns entries offsets[i]:offsets[i+1] of its columns and values."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def offsets_of(counts: Int[Tensor, "n"]) -> Int[Tensor, "n_plus_1"]:
    """Returns where rows of so many entries begin, and the end of the last."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def rows_of(offsets: Int[Tensor, "n_plus_1"]) -> Int[Tensor, "nnz"]:
    """Returns the row of every entry."""
    return torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())


def flat(offsets: Int[Tensor, "n_plus_1"], columns: Int[Tensor, "nnz"], m: int) -> Int[Tensor, "nnz"]:
    """Returns where every entry lies in the matrix of m columns, flattened.

    Reading and writing there, with `index_select`, is faster on a CPU than by row and column, and so is its gradient.
    """
    begins = torch.arange(0, m * (offsets.numel() - 1), m, device=offsets.device)
    return torch.repeat_interleave(begins, offsets.diff()).add_(columns)


@dataclass(frozen=True)
class SparseLatents:
    """Codes of n tokens in compressed rows: token t owns entries offsets[t]:offsets[t+1] of `ids` and `values`.

    The support contains the nonzeros; an entry of value 0 may carry gradient but never counts as fired.
    """

    offsets: Int[Tensor, "n_plus_1"]
    ids: Int[Tensor, "nnz"]
    values: Float[Tensor, "nnz"]
    d_sae: int
    shape: tuple[int, ...] | None = None
    """Leading dimensions of the encoded tensor, whose product is n; None means (n,)."""

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def tokens(self) -> Int[Tensor, "nnz"]:
        """Returns the token of every entry."""
        return rows_of(self.offsets)

    def with_values(self, values: Float[Tensor, "nnz"]) -> "SparseLatents":
        """Returns the same support with other values."""
        return replace(self, values=values)

    def row(self, i: int) -> tuple[Int[Tensor, "fired"], Float[Tensor, "fired"]]:
        """Returns (latent ids, values) of the latents that fire at token i (counted over flattened leading dims)."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"row: {i} is outside 0..{len(self) - 1}")
        start, stop = self.offsets[i % len(self)], self.offsets[i % len(self) + 1]
        ids, values = self.ids[start:stop], self.values[start:stop]
        return ids[values != 0], values[values != 0]

    def to_dense(self) -> Float[Tensor, "*shape d_sae"]:
        """Returns the dense codes; n * d_sae values, so for small n only."""
        dense = self.values.new_zeros(len(self), self.d_sae).index_put((self.tokens, self.ids), self.values)
        return dense if self.shape is None else dense.reshape(*self.shape, self.d_sae)

    def l0(self) -> Float[Tensor, "n"]:
        """Returns the number of latents that fire at each token."""
        fired = (self.values != 0).to(torch.float32)
        return fired.new_zeros(len(self)).index_add_(0, self.tokens, fired)

    def fired(self) -> Int[Tensor, "d_sae"]:
        """Returns at how many tokens each latent fires."""
        fired = (self.values != 0).to(torch.int64)
        return fired.new_zeros(self.d_sae).scatter_add_(0, self.ids, fired)


class Entries(NamedTuple):
    """Some entries of a [tokens, latents] matrix, one after the other."""

    tokens: Int[Tensor, "m"]
    ids: Int[Tensor, "m"]
    values: Float[Tensor, "m"]

    def take(self, index: Tensor) -> "Entries":
        """Returns the entries at an index or where a mask is true."""
        return Entries(self.tokens[index], self.ids[index], self.values[index])

    @staticmethod
    def cat(parts: "list[Entries]") -> "Entries":
        """Returns several lists of entries as one."""
        return Entries(*(torch.cat(members) for members in zip(*parts, strict=True)))

    def to_support(self, n_tokens: int) -> tuple[Int[Tensor, "n_plus_1"], Int[Tensor, "m"]]:
        """Returns (row offsets, latent ids ascending within a row)."""
        order = torch.argsort(self.ids, stable=True)
        order = order[torch.argsort(self.tokens[order], stable=True)]
        counts = torch.bincount(self.tokens, minlength=n_tokens)
        return offsets_of(counts), self.ids[order]


Support = tuple[Int[Tensor, "n_plus_1"], Int[Tensor, "nnz"]]


def by_rows(ids: Int[Tensor, "n k"]) -> Support:
    """Returns the support whose rows all have k entries."""
    n, k = ids.shape
    return torch.arange(0, n * k + 1, max(1, k), device=ids.device)[: n + 1], ids.reshape(-1)


def where(kept: Tensor) -> Support:
    """Returns the support of a [n, m] mask."""
    counts = kept.sum(1)
    places = kept.reshape(-1).nonzero()[:, 0]  # half of the memory that rows and columns take
    return offsets_of(counts), places.remainder_(kept.shape[1])
