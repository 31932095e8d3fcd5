"""Products of codes and rows of the decoder: one program a token, several rows in flight; long tokens in pieces."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.cuda import dealing
from sae.kernels.cuda.dealing import Dealt, deal, summed_beside, whole_row
from sae.kernels.cuda.launching import CHUNK, WIDEST, block_of, entries_of, launch, rows_apart, warps_of


def decode(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "m d"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
) -> Float[Tensor, "n d"]:
    """Returns the codes times the decoder, in float32."""
    out = torch.empty(len(offsets) - 1, weight.shape[1], dtype=torch.float32, device=weight.device)
    _decoded(out, values, weight, offsets, ids, None, None)
    return out


def errors(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "m d"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
    rest: Tensor,
    target: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "nnz"]]:
    """Returns (target - rest - the codes times the decoder, its products with the rows of the decoder), in float32.

    `rest` is one row or as many as there are tokens, expanded ones included. A token's rows are read twice in one
    visit, the second time while the card's cache may have them; in two visits where they are wider than a program
    holds.
    """
    (n, d), weight = target.shape, weight.contiguous()
    error = torch.empty(n, d, dtype=torch.float32, device=weight.device)
    if d > WIDEST:
        _decoded(error, values, weight, offsets, ids, rest, target)
        return error, products(offsets, ids, error, weight)
    dealt, values = deal(offsets.diff(), len(ids)), values.contiguous()
    beside = summed_beside(dealt, offsets, values, ids, weight)
    found = torch.empty(len(ids), dtype=torch.float32, device=weight.device)
    block, (rest, apart) = block_of(d), rows_apart(rest)
    launch(
        _errors, n, values, weight, offsets, ids, rest, apart, target.contiguous(), dealt.ends, beside, error, found, d,
        n, dealing.PIECE, entries_of(block), block, num_warps=warps_of(block),
    )  # fmt: skip
    _multiply(found, len(dealt.owners), dealt, offsets, ids, error, weight)
    return error, found


def products(
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
    rows: Float[Tensor, "n d"],
    weight: Float[Tensor, "m d"],
) -> Float[Tensor, "nnz"]:
    """Returns the products of each token's row with the rows of its latents, in float32."""
    found, dealt = torch.empty(len(ids), dtype=torch.float32, device=weight.device), deal(offsets.diff(), len(ids))
    _multiply(found, len(dealt.owners) + len(rows), dealt, offsets, ids, rows.contiguous(), weight)
    return found


def _multiply(
    found: Tensor, programs: int, dealt: Dealt, offsets: Tensor, ids: Tensor, rows: Tensor, weight: Tensor
) -> None:
    """Writes the products of further pieces, which are the first programs, and of rows' first pieces."""
    (n, d), weight = rows.shape, weight.contiguous()
    block = block_of(d)
    launch(
        _products, programs, offsets, ids, rows, weight, dealt.ends, dealt.owners, found, d, n, len(dealt.owners),
        d <= block, dealing.PIECE, entries_of(block), block, num_warps=warps_of(block),
    )  # fmt: skip


def _decoded(
    out: Tensor,
    values: Tensor,
    weight: Tensor,
    offsets: Tensor,
    ids: Tensor,
    rest: Tensor | None,
    target: Tensor | None,
) -> None:
    """Writes what is decoded, or, where there is a target, what is left of it."""
    (n, d), weight = out.shape, weight.contiguous()
    block, apart = block_of(d, CHUNK), 0
    if rest is not None and target is not None:
        (rest, apart), target = rows_apart(rest), target.contiguous()
    dealt, values = deal(offsets.diff(), len(ids)), values.contiguous()
    beside = summed_beside(dealt, offsets, values, ids, weight)
    chunks = triton.cdiv(d, block)
    launch(
        _decode, n * chunks, values, weight, offsets, ids, rest, apart, target, dealt.ends, beside, out, d, chunks, n,
        target is not None, dealing.PIECE, entries_of(block), block, num_warps=warps_of(block),
    )  # fmt: skip


@triton.jit
def _decode(
    values, weight, offsets, ids, rest, apart, target, ends, beside, out, d, chunks, n,
    LEFT: tl.constexpr, PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) // chunks).to(tl.int64)
    column = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    start, stop = tl.load(offsets + token), tl.load(offsets + token + 1)
    found = whole_row(values, ids, weight, start, stop, beside, ends, n, token, column, d, PIECE, ENTRIES, BLOCK)
    if LEFT:
        wanted = tl.load(target + token * d + column, mask=inside, other=0.0).to(tl.float32)
        found = wanted - tl.load(rest + token * apart + column, mask=inside, other=0.0).to(tl.float32) - found
    tl.store(out + token * d + column, found, mask=inside)


@triton.jit
def _errors(
    values, weight, offsets, ids, rest, apart, target, ends, beside, error, products, d, n,
    PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    start, stop = tl.load(offsets + token), tl.load(offsets + token + 1)
    decoded = whole_row(values, ids, weight, start, stop, beside, ends, n, token, column, d, PIECE, ENTRIES, BLOCK)
    left = tl.load(target + token * d + column, mask=inside, other=0.0).to(tl.float32)
    left = left - tl.load(rest + token * apart + column, mask=inside, other=0.0).to(tl.float32) - decoded
    tl.store(error + token * d + column, left, mask=inside)
    stop = tl.minimum(stop, start + PIECE)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        row = tl.load(ids + entry, mask=entry < stop, other=0).to(tl.int64)
        held = (entry < stop)[:, None] & inside[None, :]
        part = tl.load(weight + row[:, None] * d + column[None, :], mask=held, other=0.0).to(tl.float32)
        tl.store(products + entry, tl.sum(part * left[None, :], axis=1), mask=entry < stop)


@triton.jit
def _products(
    offsets, ids, rows, weight, ends, owners, products, d, n, most,
    WHOLE: tl.constexpr, PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    further = number < most  # no `if` that sets a number: Triton 3.5 fails at those
    token = tl.where(further, tl.load(owners + number, mask=further, other=0), number - most)
    if token < n:
        before = tl.load(ends + token - 1, mask=further & (token > 0), other=0)
        start = tl.load(offsets + token) + tl.where(further, 1 + number - before, 0) * PIECE
        stop = tl.minimum(tl.load(offsets + token + 1), start + PIECE)
        column = tl.arange(0, BLOCK)
        own = tl.load(rows + token * d + column, mask=column < d, other=0.0).to(tl.float32)
        for first in range(start, stop, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            row = tl.load(ids + entry, mask=entry < stop, other=0).to(tl.int64)
            held = (entry < stop)[:, None] & (column < d)[None, :]
            part = tl.load(weight + row[:, None] * d + column[None, :], mask=held, other=0.0).to(tl.float32)
            total = tl.sum(part * own[None, :], axis=1)
            if not WHOLE:
                for begin in range(BLOCK, d, BLOCK):
                    far = begin + column
                    more = tl.load(rows + token * d + far, mask=far < d, other=0.0).to(tl.float32)
                    held = (entry < stop)[:, None] & (far < d)[None, :]
                    part = tl.load(weight + row[:, None] * d + far[None, :], mask=held, other=0.0).to(tl.float32)
                    total += tl.sum(part * more[None, :], axis=1)
            tl.store(products + entry, total, mask=entry < stop)
