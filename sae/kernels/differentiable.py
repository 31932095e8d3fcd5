"""The sparse products with their gradients, which touch the support and nothing else.

Where they are collected (`sink.py`), those of the weights and of what is before the encoder go there alone.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import dense
from sae.kernels.dispatch import densely, kernel
from sae.kernels.sink import Gradient


class _EncodeAt(torch.autograd.Function):
    """Pre-activations at a support, without computing them where they are known."""

    @staticmethod
    def forward(ctx: Any, y, weight, bias, offsets, ids, known, into) -> Any:
        ctx.save_for_backward(y, weight, offsets, ids)
        ctx.into = into
        if known is not None:
            return known.clone()
        return _products(offsets, ids, y, weight) + bias.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (y, weight, offsets, ids) = grads, ctx.saved_tensors
        through, wanted, biased, *_ = ctx.needs_input_grad
        if ctx.into is not None:
            if wanted:
                ctx.into.of_encoder(offsets, ids, grad, y, through)
            return None, None, None, None, None, None, None
        grad_y = _decode(grad, weight, offsets, ids) if through else None
        grad_weight = _transposed(offsets, ids, grad, y, weight) if wanted else None
        grad_bias = grad.new_zeros(len(weight)).index_add_(0, ids, grad) if biased else None
        return grad_y, grad_weight, grad_bias, None, None, None, None


class _Decode(torch.autograd.Function):
    """The product of sparse codes and the decoder; no [n, d_sae] matrix is formed."""

    @staticmethod
    def forward(ctx: Any, values, weight, offsets, ids, into):
        ctx.save_for_backward(values, weight, offsets, ids)
        ctx.into = into
        return _decode(values, weight, offsets, ids)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradient, (values, weight, offsets, ids) = grads[0].contiguous(), ctx.saved_tensors
        (of_values, wanted, *_), into, grad_weight = ctx.needs_input_grad, ctx.into, None
        slopes = _products(offsets, ids, gradient, weight) if of_values or (wanted and into) else None
        if wanted and into is not None:
            into.of_decoder(offsets, ids, values, gradient, slopes)
        elif wanted:
            grad_weight = _transposed(offsets, ids, values, gradient, weight)
        return slopes if of_values else None, grad_weight, None, None, None


class _Fit(torch.autograd.Function):
    """Codes decoded and set against a target: what is made, its squared error, and the error.

    The error is visited with the decoder once: its products with the rows of the support are, but for a factor, the
    gradient of the codes where only the squared error is looked at.
    """

    @staticmethod
    def forward(ctx: Any, values, weight, rest, target, offsets, ids, into):
        way = dense.errors if densely(offsets, ids, weight) else kernel("errors", weight)
        error, slopes = way(values, weight, offsets, ids, rest, target)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, weight, offsets, ids, error, slopes)
        ctx.into, ctx.one_rest = into, rest.dim() == 1
        made, square = target - error, error.square().sum()
        ctx.mark_non_differentiable(error)
        return made, square, error

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        of_made, of_square, _ = grads
        values, weight, offsets, ids, error, slopes = ctx.saved_tensors
        of_values, wanted, of_rest, *_ = ctx.needs_input_grad
        if of_made is None and of_square is None:
            return None, None, None, None, None, None, None
        gradient = torch.zeros_like(error)
        if of_square is not None:
            gradient, slopes = (-2 * of_square) * error, (-2 * of_square) * slopes
        if of_made is not None:
            gradient = (gradient + of_made).contiguous()
            slopes = _products(offsets, ids, gradient, weight)
        grad_weight = None
        if wanted and ctx.into is not None:
            ctx.into.of_decoder(offsets, ids, values, gradient, slopes)
        elif wanted:
            grad_weight = _transposed(offsets, ids, values, gradient, weight)
        rest = (gradient.sum(0) if ctx.one_rest else gradient) if of_rest else None
        return slopes if of_values else None, grad_weight, rest, None, None, None, None


def encode_at(
    y: Float[Tensor, "n d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
    known: Float[Tensor, "nnz"] | None = None,
    into: Gradient | None = None,
) -> Float[Tensor, "nnz"]:
    """Returns y W^T + b at the support, differentiable in y, W and b.

    `known` are these numbers where the caller has them already, from the product that selection looked at.
    """
    return _EncodeAt.apply(y, weight, bias, offsets, ids, known, into)  # type: ignore[no-any-return]


def decode(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "d_sae d_out"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
    into: Gradient | None = None,
) -> Float[Tensor, "n d_out"]:
    """Returns the codes times the decoder, differentiable in values and W."""
    return _Decode.apply(values.to(weight.dtype), weight, offsets, ids, into)  # type: ignore[no-any-return]


def fit(
    values: Float[Tensor, "nnz"],
    weight: Float[Tensor, "d_sae d_out"],
    rest: Float[Tensor, "*n d_out"],
    target: Float[Tensor, "n d_out"],
    offsets: Int[Tensor, "n_plus_1"],
    ids: Int[Tensor, "nnz"],
    into: Gradient | None = None,
) -> tuple[Float[Tensor, "n d_out"], Float[Tensor, ""], Float[Tensor, "n d_out"]]:
    """Returns (rest + codes times W, the sum of squares of the error, the error: target minus the first).

    The first two are differentiable in values, W and rest; the error is not.
    """
    return _Fit.apply(values, weight, rest, target, offsets, ids, into)  # type: ignore[no-any-return]


def _decode(values: Tensor, weight: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    way = dense.decode if densely(offsets, ids, weight) else kernel("decode", weight)
    return way(values, weight, offsets, ids)


def _products(offsets: Tensor, ids: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    way = dense.products if densely(offsets, ids, weight) else kernel("products", weight)
    return way(offsets, ids, rows, weight)


def _transposed(offsets: Tensor, ids: Tensor, coefficients: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Returns what the transposed codes make of rows: the gradient of a weight."""
    if densely(offsets, ids, weight):
        return dense.matrix(coefficients.to(rows.dtype), offsets, ids, len(weight)).T @ rows
    out = rows.new_empty(len(weight), rows.shape[1])
    by = kernel("by_latent", weight)(offsets, ids, len(weight))
    kernel("weight_gradient", weight)(by, coefficients, rows, out)
    return out
