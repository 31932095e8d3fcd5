"""Adam in one pass over the rows: clipping, projection, the update, the norm of rows, and the copy in bfloat16."""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels.cuda.launching import CHUNK, WIDEST, block_of, launch, warps_of
from sae.kernels.update import Update


def adam(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    update: Update,
    *,
    along: Float[Tensor, "m"] | None = None,
    unit: bool = False,
    half: Tensor | None = None,
    touched: Bool[Tensor, "m"] | None = None,
) -> None:
    """Takes a step of Adam in place, if it applies; the host reads neither that nor its number.

    The gradient loses `along` times the weight, by row. With `unit` rows then get norm 1; `half` gets the new weight,
    rounded. Weights are [m, d], or [m] for biases. Rows that are not `touched` stay as they are.
    """
    if not all(held.is_contiguous() for held in (weight, gradient, mean, square, half) if held is not None):
        raise ValueError("adam: a tensor that is changed in place is not contiguous")
    _, beta1, beta2, eps, step, scale, applies = update
    m, d = weight.shape if weight.dim() == 2 else (1, len(weight)) if touched is None else (len(weight), 1)
    whole = unit and d <= WIDEST
    block = block_of(d, WIDEST if whole else CHUNK)
    chunks = triton.cdiv(d, block)
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    corrected = torch.empty(2, dtype=torch.float32, device=weight.device)
    launch(_corrected, 1, corrected, step, update.rate, *logs, num_warps=1)
    launch(
        _adam, m * chunks, weight, gradient, mean, square, along, half, touched, scale, applies, corrected, d, chunks,
        beta1, beta2, eps, along is not None, whole, half is not None, touched is not None, block,
        num_warps=warps_of(block),
    )  # fmt: skip
    if unit and not whole:
        given = half, touched, applies, d, half is not None, touched is not None
        launch(_normalized, m, weight, *given, block, num_warps=warps_of(block))


@triton.jit
def _corrected(corrected, step, rate, LOG1: tl.constexpr, LOG2: tl.constexpr):
    """Writes the size of a step, and by what roots are divided, for means that began at 0."""
    number = tl.load(step).to(tl.float64)  # in float32, 1 - beta2 would keep four digits
    tl.store(corrected, (rate / (1 - tl.exp(number * LOG1))).to(tl.float32))
    tl.store(corrected + 1, tl.sqrt(1 - tl.exp(number * LOG2)).to(tl.float32))


@triton.jit
def _adam(
    weight, gradient, mean, square, along, half, touched, scale, applies, corrected, d, chunks,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    ALONG: tl.constexpr, UNIT: tl.constexpr, HALF: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // chunks).to(tl.int64)
    taken = tl.load(applies).to(tl.int32)
    if SOME:
        taken *= tl.load(touched + row).to(tl.int32)
    if taken != 0:
        column = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
        at, inside = row * d + column, column < d
        w = tl.load(weight + at, mask=inside, other=0.0)
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        if ALONG:
            g -= tl.load(along + row) * w
        g *= tl.load(scale)
        first = tl.load(mean + at, mask=inside, other=0.0) * BETA1 + g * (1 - BETA1)
        second = tl.load(square + at, mask=inside, other=0.0) * BETA2 + g * g * (1 - BETA2)
        tl.store(mean + at, first, mask=inside)
        tl.store(square + at, second, mask=inside)
        root = tl.div_rn(tl.sqrt_rn(second), tl.load(corrected + 1))
        w -= tl.load(corrected) * tl.div_rn(first, root + EPS)
        if UNIT:
            w = tl.div_rn(w, tl.maximum(tl.sqrt_rn(tl.sum(w * w, axis=0)), 1e-30))
        tl.store(weight + at, w, mask=inside)
        if HALF:
            tl.store(half + at, w.to(half.dtype.element_ty), mask=inside)


@triton.jit
def _normalized(weight, half, touched, applies, d, HALF: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr):
    """Divides one row that is wider than a program holds by its norm."""
    row = tl.program_id(0).to(tl.int64)
    taken = tl.load(applies).to(tl.int32)
    if SOME:
        taken *= tl.load(touched + row).to(tl.int32)
    if taken != 0:
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        for begin in range(0, d, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            w = tl.load(weight + row * d + column, mask=column < d, other=0.0)
            squares += w * w
        norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=0)), 1e-30)
        for begin in range(0, d, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            w = tl.div_rn(tl.load(weight + row * d + column, mask=column < d, other=0.0), norm)
            tl.store(weight + row * d + column, w, mask=column < d)
            if HALF:
                tl.store(half + row * d + column, w.to(half.dtype.element_ty), mask=column < d)
