"""Sparse products: `spmm`, `sddmm` and `transpose` are all that training and inference need.

A sparse matrix is (offsets, columns, values): row i owns entries offsets[i]:offsets[i+1]. `reference` is plain torch
and obviously right; `segmented` is the fast path for few entries and `dense` for many, both tested against it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.compressed import offsets_of, rows_of
from sae.kernels import dense, segmented

__all__ = ["decode", "encode_at", "sddmm", "spmm", "transpose"]
DENSE_SHARE = (
    0.3  # of the entries: from here on dense products are faster on two CPU cores (ReLU coders begin at a half)
)


def spmm(
    offsets: Int[Tensor, "rows_plus_1"],
    columns: Int[Tensor, "nnz"],
    values: Float[Tensor, "nnz"],
    matrix: Float[Tensor, "m d"],
) -> Float[Tensor, "rows d"]:
    """Returns the sparse matrix times `matrix`."""
    chosen = dense if columns.numel() > DENSE_SHARE * (offsets.numel() - 1) * len(matrix) else segmented
    return chosen.spmm(offsets, columns, values, matrix)


def sddmm(
    offsets: Int[Tensor, "rows_plus_1"],
    columns: Int[Tensor, "nnz"],
    a: Float[Tensor, "rows d"],
    b: Float[Tensor, "m d"],
) -> Float[Tensor, "nnz"]:
    """Returns <a_i, b_j> for every entry (i, j) of the support."""
    chosen = dense if columns.numel() > DENSE_SHARE * len(a) * len(b) else segmented
    return chosen.sddmm(offsets, columns, a, b)


def transpose(
    offsets: Int[Tensor, "rows_plus_1"], columns: Int[Tensor, "nnz"], n_columns: int
) -> tuple[Int[Tensor, "columns_plus_1"], Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:
    """Returns (offsets, rows, order) of the transposed matrix; its values are `values[order]`."""
    order = torch.argsort(columns, stable=True)
    rows = rows_of(offsets)
    counts = torch.bincount(columns, minlength=n_columns)
    return offsets_of(counts), rows[order], order


class _EncodeAt(torch.autograd.Function):
    """Pre-activations at a support, with gradients that touch the support only."""

    @staticmethod
    def forward(ctx, y, weight, bias, offsets, ids, known):
        ctx.save_for_backward(y, weight, offsets, ids)
        return sddmm(offsets, ids, y, weight) + bias[ids] if known is None else known.clone()

    @staticmethod
    def backward(ctx, *grads):
        (grad,), (y, weight, offsets, ids) = grads, ctx.saved_tensors
        grad_y = spmm(offsets, ids, grad, weight) if ctx.needs_input_grad[0] else None
        by_latent, tokens, order = transpose(offsets, ids, len(weight))
        grad_weight = spmm(by_latent, tokens, grad[order], y) if ctx.needs_input_grad[1] else None
        grad_bias = grad.new_zeros(len(weight)).index_add_(0, ids, grad) if ctx.needs_input_grad[2] else None
        return grad_y, grad_weight, grad_bias, None, None, None


class _Decode(torch.autograd.Function):
    """The product of sparse codes and the decoder."""

    @staticmethod
    def forward(ctx, values, weight, offsets, ids):
        ctx.save_for_backward(values, weight, offsets, ids)
        return spmm(offsets, ids, values, weight)

    @staticmethod
    def backward(ctx, *grads):
        grad, (values, weight, offsets, ids) = grads[0].contiguous(), ctx.saved_tensors
        grad_values = sddmm(offsets, ids, grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            by_latent, tokens, order = transpose(offsets, ids, len(weight))
            grad_weight = spmm(by_latent, tokens, values[order], grad)
        return grad_values, grad_weight, None, None


def encode_at(
    y: Float[Tensor, "n d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
    known: Float[Tensor, "nnz"] | None = None,
) -> Float[Tensor, "nnz"]:
    """Returns y W^T + b at the support, differentiable in y, W and b.

    `known` are these numbers where the caller has them already, from the product that selection looked at.
    """
    return _EncodeAt.apply(y, weight, bias, offsets, ids, known)  # type: ignore[no-any-return]


def decode(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "d_sae d_out"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
) -> Float[Tensor, "n d_out"]:
    """Returns the codes times the decoder, differentiable in values and W; no [n, d_sae] matrix is formed."""
    return _Decode.apply(values, weight, offsets, ids)  # type: ignore[no-any-return]
