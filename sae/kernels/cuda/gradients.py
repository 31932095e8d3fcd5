"""Gradients of weights, latent by latent, those with the most entries first; those of hot latents in pieces."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.cuda import dealing
from sae.kernels.cuda.dealing import Dealt, deal, summed_beside, whole_row
from sae.kernels.cuda.launching import CHUNK, block_of, entries_of, launch, warps_of


class ByLatent(NamedTuple):
    """The entries of codes, latent by latent, and the order in which latents are visited."""

    starts: Int[Tensor, "m_plus_1"]
    """Where each latent's begin in `order` and `tokens`."""
    order: Int[Tensor, "nnz"]
    """Numbers of entries."""
    tokens: Int[Tensor, "nnz"]
    ranked: Int[Tensor, "m"]
    """Latents, those with the most entries first."""
    dealt: Dealt
    """The further pieces of the first of these: of as many as may have any."""


def by_latent(offsets: Int[Tensor, "n_plus_1"], ids: Int[Tensor, "nnz"], m: int) -> ByLatent:
    """Returns the entries of compressed rows by latent, in their order within one. The host reads nothing."""
    nnz, device = len(ids), ids.device
    kind = torch.int32 if max(nnz, m) < 2**31 else torch.long
    found, order = ids.to(kind).sort(stable=True)
    starts = torch.searchsorted(found, torch.arange(m + 1, dtype=kind, device=device))
    tokens = torch.searchsorted(offsets, order, right=True).sub_(1)
    counts, ranked = starts.diff().sort(descending=True, stable=True)
    hot = nnz // dealing.PIECE  # a latent with a further piece has more entries than one
    return ByLatent(starts, order.to(kind), tokens.to(kind), ranked.to(kind), deal(counts[:hot], nnz))


def weight_gradient(
    by: ByLatent, coefficients: Float[Tensor, "nnz"], rows: Float[Tensor, "n d"], out: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    """Writes sums of coefficients times rows by latent to `out` and returns the sum of its squares, in float64."""
    if not out.is_contiguous():
        raise ValueError("weight_gradient: rows of what is written do not lie side by side")
    m, d = out.shape
    block = block_of(d, CHUNK)
    chunks = triton.cdiv(d, block)
    held, rows = coefficients.index_select(0, by.order), rows.contiguous()
    beside = summed_beside(by.dealt, by.starts, held, by.tokens, rows, by.ranked)
    squares = torch.empty(m, chunks, dtype=torch.float32, device=out.device)
    launch(
        _summed, m * chunks, held, by.tokens, rows, by.starts, by.ranked, by.dealt.ends, beside, out, squares, d,
        chunks, len(by.dealt.ends), dealing.PIECE, entries_of(block), block, num_warps=warps_of(block),
    )  # fmt: skip
    return squares.sum(dtype=torch.float64)


@triton.jit
def _summed(
    coefficients, tokens, rows, starts, ranked, ends, beside, out, squares, d, chunks, hot,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(ranked + place).to(tl.int64)
    start, stop = tl.load(starts + latent), tl.load(starts + latent + 1)
    total = whole_row(
        coefficients, tokens, rows, start, stop, beside, ends, hot, place, column, d, PIECE, ENTRIES, BLOCK
    )
    tl.store(out + latent * d + column, total, mask=column < d)
    tl.store(squares + latent * chunks + chunk, tl.sum(total * total, axis=0))
