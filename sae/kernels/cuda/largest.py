"""The k largest of every row in two stages: the k groups of columns with the largest maxima, then the k among those.

Groups are runs of columns. Of equal maxima the earlier group is taken, so nothing outside of the k groups comes before
their k maxima, whatever the ties; where there are many groups, they are chosen in the same way. A choice is made by
halving the range of the k-th largest, in registers: no sort. Scores are compared as integers in their order.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import largest
from sae.kernels.cuda.launching import launch

HELD = 4096
"""Numbers among which one program chooses."""
GROUP = 64
"""Columns of a group, at most."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOP = tl.constexpr(2**31 - 1)
BOTTOM = tl.constexpr(-(2**31))
"""Of what is not there: below the integer of -inf."""


def top_ids(scores: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """Returns the column ids of the k largest entries of every row, ascending; ties to the lower id, NaN largest.

    Rows may lie apart, but their entries must be contiguous. More than a quarter of what one program holds is chosen by
    plain torch, and so is float64.
    """
    n, m = scores.shape
    if k == m or 4 * k > HELD or scores.dtype not in DTYPES:
        return largest.top_ids(scores, k)
    if k == 0:
        return torch.empty(n, 0, dtype=torch.long, device=scores.device)
    return _top(scores, k, floats=True)


def _top(source: Tensor, k: int, floats: bool) -> Tensor:
    """Returns the places of the k largest of every row, of scores or of integers."""
    (n, m), device = source.shape, source.device
    ids = torch.empty(n, k, dtype=torch.long, device=device)
    if m <= HELD:
        block = max(64, triton.next_power_of_2(m))
        launch(
            _chosen, n, source, source.stride(0), m, ids, ids, k, m, floats, False, 1, block, num_warps=_warps(block)
        )
        return ids
    size = min(GROUP, 1 << (HELD // k).bit_length() - 1)
    groups = triton.cdiv(m, size)
    maxima = torch.empty(n, groups, dtype=torch.int32, device=device)
    per = HELD // size
    programs = n * triton.cdiv(groups, per)
    launch(_maxima, programs, source, source.stride(0), m, maxima, groups, floats, size, per, num_warps=4)
    best = _top(maxima, k, floats=False)
    block = triton.next_power_of_2(k * size)
    launch(
        _chosen, n, source, source.stride(0), m, best, ids, k, k * size, floats, True, size, block,
        num_warps=_warps(block),
    )  # fmt: skip
    return ids


def _warps(block: int) -> int:
    return min(8, max(1, block // 512))


@triton.jit
def _integers(scores):
    """Returns integers in the order of the scores: NaN above all, both zeros alike."""
    bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & TOP
    signed = tl.where(bits < 0, -size, size)
    return tl.where(size > 0x7F800000, TOP, signed)


@triton.jit
def _maxima(source, stride, m, maxima, groups, FLOATS: tl.constexpr, SIZE: tl.constexpr, PER: tl.constexpr):
    """Writes the largest of each of PER groups."""
    blocks = tl.cdiv(groups, PER)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * PER + tl.arange(0, PER)
    column = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    found = tl.load(source + row * stride + column, mask=column < m, other=0)
    if FLOATS:
        found = _integers(found)
    found = tl.where(column < m, found, BOTTOM)
    tl.store(maxima + row * groups + group, tl.max(found, axis=1), mask=group < groups)


@triton.jit
def _chosen(
    source, stride, m, groups, ids, k, length,
    FLOATS: tl.constexpr, GROUPED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the columns of the k largest of one row, or of the members of k of its groups, ascending."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    column = place
    if GROUPED:
        group = tl.load(groups + row * k + place // SIZE, mask=place < length, other=0)
        column = (group * SIZE).to(tl.int32) + place % SIZE
    inside = (place < length) & (column < m)
    found = tl.load(source + row * stride + column, mask=inside, other=0)
    if FLOATS:
        found = _integers(found)
    found = tl.where(inside, found, BOTTOM)
    enough = tl.sum((found >= 0).to(tl.int32), axis=0) >= k
    least = tl.where(enough, 0, BOTTOM)  # to become the k-th largest: the largest that k are not below
    for bit in range(31):
        raised = least + (1 << (30 - bit))
        enough = tl.sum((found >= raised).to(tl.int32), axis=0) >= k
        least = tl.where(enough, raised, least)
    equal = (found == least).to(tl.int32)
    left = k - tl.sum((found > least).to(tl.int32), axis=0)
    kept = (found > least) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= left))
    slot = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(ids + row * k + slot, column.to(tl.int64), mask=kept)
