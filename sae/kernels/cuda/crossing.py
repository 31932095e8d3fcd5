"""The entries above their cut: counted by blocks, scanned, written to their places. The host reads nothing."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.cuda.launching import launch

BLOCK = 1024


def above(
    scores: Float[Tensor, "n m"], cuts: Float[Tensor, "m_or_1"], capacity: int
) -> tuple[Int[Tensor, "n"], Int[Tensor, "capacity"], Int[Tensor, ""]]:
    """Returns (found entries of each row, their places, how many there are) of what is above its cut, or NaN.

    Places are token * m + latent, ascending, and -1 where there are fewer than `capacity`; of more the first are found.
    Rows of scores may lie apart. Blocks in which nothing is above are read once, others twice.
    """
    n, m = scores.shape
    blocks = triton.cdiv(m, BLOCK)
    hits = torch.empty(n, blocks, dtype=torch.int32, device=scores.device)
    places = torch.full((capacity,), -1, dtype=torch.long, device=scores.device)
    step = cuts.stride(0) if len(cuts) > 1 else 0
    launch(_counted, n * blocks, scores, scores.stride(0), m, cuts, step, hits, BLOCK, num_warps=4)
    ends = hits.view(-1).cumsum(0)
    launch(
        _written, n * blocks, scores, scores.stride(0), m, cuts, step, hits, ends, places, capacity, BLOCK, num_warps=4
    )
    found = torch.cat([ends.new_zeros(1), ends.view(n, blocks)[:, -1]]).clamp_max_(capacity).diff()
    return found, places, hits.sum()


@triton.jit
def _crossed(scores, stride, m, cuts, step, row, column):
    """Returns which of these columns of a row are above their cuts."""
    inside = column < m
    score = tl.load(scores + row * stride + column, mask=inside, other=0.0)
    cut = tl.load(cuts + column * step, mask=inside, other=0.0)
    return inside & ((score > cut) | (score != score))


@triton.jit
def _counted(scores, stride, m, cuts, step, hits, BLOCK: tl.constexpr):
    blocks = tl.cdiv(m, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    crossed = _crossed(scores, stride, m, cuts, step, row, column)
    tl.store(hits + program, tl.sum(crossed.to(tl.int32), axis=0))


@triton.jit
def _written(scores, stride, m, cuts, step, hits, ends, places, capacity, BLOCK: tl.constexpr):
    blocks = tl.cdiv(m, BLOCK)
    program = tl.program_id(0)
    own = tl.load(hits + program)
    begin = tl.load(ends + program) - own
    if (own > 0) & (begin < capacity):
        row = (program // blocks).to(tl.int64)
        column = program % blocks * BLOCK + tl.arange(0, BLOCK)
        crossed = _crossed(scores, stride, m, cuts, step, row, column)
        slot = begin + tl.cumsum(crossed.to(tl.int32), axis=0) - 1
        tl.store(places + slot, row * m + column, mask=crossed & (slot < capacity))
