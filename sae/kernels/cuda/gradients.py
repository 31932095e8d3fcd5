"""Gradients of weights, latent by latent, those with the most entries first, and these in pieces.

A latent's first entries are summed by one program; further pieces are dealt before all others, summed beside, and added
in their order. So no program has more than a piece, sums do not depend on which ends first, and there are no atomics.
How many pieces there are, only the device knows: there are as many programs as there can be, and the rest end at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.cuda.launching import CHUNK, block_of, entries_of, launch, warps_of, weighted_rows

PIECE = 512
"""Entries that one program sums at most."""


class ByLatent(NamedTuple):
    """The entries of codes, latent by latent, and the order in which latents are visited."""

    starts: Int[Tensor, "m_plus_1"]
    """Where each latent's begin in `order` and `tokens`."""
    order: Int[Tensor, "nnz"]
    """Numbers of entries."""
    tokens: Int[Tensor, "nnz"]
    ranked: Int[Tensor, "m"]
    """Latents, those with the most entries first."""
    ends: Int[Tensor, "hot"]
    """Of the first of these: how many further pieces there are up to and with each."""
    owners: Int[Tensor, "pieces"]
    """The place in `ranked` of every further piece; len(ends) where there is none."""


def by_latent(offsets: Int[Tensor, "n_plus_1"], ids: Int[Tensor, "nnz"], m: int) -> ByLatent:
    """Returns the entries of compressed rows by latent, in their order within one. The host reads nothing."""
    nnz, device = len(ids), ids.device
    kind = torch.int32 if max(nnz, m) < 2**31 else torch.long
    found, order = ids.to(kind).sort(stable=True)
    starts = torch.searchsorted(found, torch.arange(m + 1, dtype=kind, device=device))
    tokens = torch.searchsorted(offsets, order, right=True).sub_(1)
    counts, ranked = starts.diff().sort(descending=True, stable=True)
    most = nnz // PIECE  # a latent with a further piece has more entries than one; no more pieces than that exist
    ends = ((counts[:most] - 1).clamp_min_(0) // PIECE).cumsum(0)
    owners = torch.searchsorted(ends, torch.arange(most, device=device), right=True)
    return ByLatent(starts, order.to(kind), tokens.to(kind), ranked.to(kind), ends, owners)


def weight_gradient(
    by: ByLatent, coefficients: Float[Tensor, "nnz"], rows: Float[Tensor, "n d"], out: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    """Writes sums of coefficients times rows by latent to `out` and returns the sum of its squares, in float64."""
    m, d = out.shape
    block, most = block_of(d, CHUNK), len(by.owners)
    chunks = triton.cdiv(d, block)
    held = coefficients.index_select(0, by.order)
    beside = torch.empty(most, d, dtype=torch.float32, device=out.device)
    squares = torch.empty(m, chunks, dtype=torch.float32, device=out.device)
    launch(
        _summed, (most + m) * chunks, held, by.tokens, rows, by.starts, by.ranked, by.ends, by.owners, out, beside,
        squares, d, chunks, len(by.ends), most, PIECE, entries_of(block), block, num_warps=warps_of(block),
    )  # fmt: skip
    launch(
        _joined, len(by.ends) * chunks, by.ranked, by.ends, out, beside, squares, d, chunks, block,
        num_warps=warps_of(block),
    )  # fmt: skip
    return squares.sum(dtype=torch.float64)


@triton.jit
def _summed(
    coefficients, tokens, rows, starts, ranked, ends, owners, out, beside, squares, d, chunks, hot, most,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums one piece of one latent, at some columns: the first into `out`, a further one beside."""
    item, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    if item < most:
        rank = tl.load(owners + item)
        if rank < hot:
            latent = tl.load(ranked + rank)
            before = tl.load(ends + rank - 1, mask=rank > 0, other=0)
            start = tl.load(starts + latent) + (1 + item - before) * PIECE
            stop = tl.minimum(tl.load(starts + latent + 1), start + PIECE)
            total = weighted_rows(coefficients, tokens, rows, start, stop, column, d, ENTRIES, BLOCK)
            tl.store(beside + item.to(tl.int64) * d + column, total, mask=column < d)
    else:
        latent = tl.load(ranked + item - most).to(tl.int64)
        start = tl.load(starts + latent)
        stop = tl.minimum(tl.load(starts + latent + 1), start + PIECE)
        total = weighted_rows(coefficients, tokens, rows, start, stop, column, d, ENTRIES, BLOCK)
        tl.store(out + latent * d + column, total, mask=column < d)
        tl.store(squares + (item - most).to(tl.int64) * chunks + chunk, tl.sum(total * total, axis=0))


@triton.jit
def _joined(ranked, ends, out, beside, squares, d, chunks, BLOCK: tl.constexpr):
    """Adds the further pieces of one latent to its first."""
    rank, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    begin = tl.load(ends + rank - 1, mask=rank > 0, other=0)
    end = tl.load(ends + rank)
    if begin < end:
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        at = out + tl.load(ranked + rank).to(tl.int64) * d + column
        total = tl.load(at, mask=column < d, other=0.0).to(tl.float32)
        for piece in range(begin, end):
            total += tl.load(beside + piece * d + column, mask=column < d, other=0.0)
        tl.store(at, total, mask=column < d)
        tl.store(squares + rank.to(tl.int64) * chunks + chunk, tl.sum(total * total, axis=0))
