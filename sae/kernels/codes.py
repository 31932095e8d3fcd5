"""Compressed sparse rows: row i of a matrix owns entries offsets[i]:offsets[i+1] of its columns and values."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae.kernels.rows import counted, flat, offsets_of, rows_of
from sae.kernels.tensorlike import Tensorlike

__all__ = [
    "PAD",
    "ByLatent",
    "Entries",
    "SparseLatents",
    "Support",
    "by_rows",
    "counted",
    "flat",
    "offsets_of",
    "rows_of",
    "where",
]

PAD = -(2.0**99)
"""Pre-activation of an entry that only fills a buffer: it fires nowhere, and its gradient is 0.

A power of 2, so that it is found again after it was bfloat16.
"""


@dataclass(frozen=True, eq=False, repr=False)
class SparseLatents(Tensorlike):
    """Codes of n tokens in compressed rows: token t owns entries offsets[t]:offsets[t+1] of `ids` and `values`.

    The support contains the nonzeros; an entry of value 0 may carry gradient but never counts as fired. Indexed,
    compared, multiplied and summed they are what the dense tensor [*leading, d_sae] is (`sae/kernels/tensorlike.py`):
    `z[0]`, `z[:, 17]`, `z > 0.5`, `z * weights`, `(z > 0).sum(-1)`, `z.topk(5)`; `np.asarray` and `torch.as_tensor`
    make it.
    """

    offsets: Int[Tensor, "n_plus_1"]
    ids: Int[Tensor, "nnz"]
    values: Shaped[Tensor, "nnz"]
    """Codes; of a comparison, whether it holds."""
    d_sae: int
    leading: tuple[int, ...] | None = None
    """Leading dimensions of the encoded tensor, whose product is n; None means (n,)."""

    @property
    def tokens(self) -> Int[Tensor, "nnz"]:
        """Returns the token of every entry."""
        return rows_of(self.offsets, len(self.ids))

    @staticmethod
    def from_dense(dense: Float[Tensor, "*shape d_sae"]) -> "SparseLatents":
        """Returns dense codes as sparse ones: the nonzeros or, where a gradient is wanted, which zeros have, all."""
        rows = dense.reshape(-1, dense.shape[-1])
        kept = torch.ones_like(rows, dtype=torch.bool) if dense.requires_grad else rows != 0
        return SparseLatents(*where(kept), rows[kept], dense.shape[-1], tuple(dense.shape[:-1]))

    def with_values(self, values: Shaped[Tensor, "nnz"]) -> "SparseLatents":
        """Returns the same support with other values."""
        return replace(self, values=values)

    def row(self, i: int) -> tuple[Int[Tensor, "fired"], Shaped[Tensor, "fired"]]:
        """Returns (latent ids, values) of the latents that fire at token i (counted over flattened leading dims)."""
        n = self.n_tokens
        if not -n <= i < n:
            raise IndexError(f"row: {i} is outside 0..{n - 1}")
        start, stop = self.offsets[i % n], self.offsets[i % n + 1]
        ids, values = self.ids[start:stop], self.values[start:stop]
        return ids[values != 0], values[values != 0]

    def to_dense(self) -> Shaped[Tensor, "*shape d_sae"]:
        """Returns the dense codes; n * d_sae values, so for small n only."""
        dense = self.values.new_zeros(self.n_tokens, self.d_sae).index_put((self.tokens, self.ids), self.values)
        return dense.reshape(self.shape)

    def l0(self) -> Float[Tensor, "n"]:
        """Returns the number of latents that fire at each token."""
        fired = (self.values != 0).to(torch.float32)
        return fired.new_zeros(self.n_tokens).index_add_(0, self.tokens, fired)

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

    def to_rows(self, n_tokens: int) -> tuple[Int[Tensor, "n_plus_1"], Int[Tensor, "m"], Shaped[Tensor, "m"]]:
        """Returns (row offsets, latent ids ascending within a row, values)."""
        order = torch.argsort(self.ids, stable=True)
        order = order[torch.argsort(self.tokens[order], stable=True)]
        return offsets_of(counted(self.tokens, n_tokens)), self.ids[order], self.values[order]

    def to_support(self, n_tokens: int) -> tuple[Int[Tensor, "n_plus_1"], Int[Tensor, "m"]]:
        """Returns (row offsets, latent ids ascending within a row)."""
        return self.to_rows(n_tokens)[:2]


class ByLatent(NamedTuple):
    """The entries of some codes, sorted by latent: latent j owns starts[j]:starts[j+1] of `order` and `tokens`."""

    starts: Int[Tensor, "m_plus_1"]
    order: Int[Tensor, "nnz"]
    """Numbers of entries, those of a latent in their order."""
    tokens: Int[Tensor, "nnz"]
    """Their rows."""


Support = tuple[Int[Tensor, "n_plus_1"], Int[Tensor, "nnz"]]


def by_rows(ids: Int[Tensor, "n k"]) -> Support:
    """Returns the support whose rows all have k entries."""
    n, k = ids.shape
    return torch.arange(n + 1, device=ids.device) * k, ids.reshape(-1)


def where(kept: Tensor) -> Support:
    """Returns the support of a [n, m] mask."""
    counts = kept.sum(1)
    places = kept.reshape(-1).nonzero()[:, 0]  # half of the memory that rows and columns take
    return offsets_of(counts), places.remainder_(kept.shape[1])
