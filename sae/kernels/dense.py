"""By way of dense products: for codes so dense that skipping zeros costs more than multiplying them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.codes import flat


class _EncodeAt(torch.autograd.Function):
    """The product at the support, without computing it where it is known."""

    @staticmethod
    def forward(ctx, y, weight, bias, places, known):
        ctx.save_for_backward(y, weight, places)
        if known is not None:
            return known.clone()
        return torch.nn.functional.linear(y, weight, bias).view(-1).index_select(0, places)

    @staticmethod
    def backward(ctx, *grads):
        y, weight, places = ctx.saved_tensors
        full = _full(grads[0], places, len(y), len(weight))
        grad_y = full @ weight if ctx.needs_input_grad[0] else None
        grad_weight = full.T @ y if ctx.needs_input_grad[1] else None
        return grad_y, grad_weight, full.sum(0), None, None


def encode_at(y, weight, bias, offsets, ids, known=None):
    """Returns y W^T + b at the support, as `sae.kernels.encode_at` says."""
    return _EncodeAt.apply(y, weight, bias, flat(offsets, ids, len(weight)), known)


def decode(values, weight, offsets, ids):
    """Returns the codes times the decoder."""
    places = flat(offsets, ids, len(weight))
    return _full(values.to(weight.dtype), places, offsets.numel() - 1, len(weight)) @ weight


def _full(values: Float[Tensor, "nnz"], places: Int[Tensor, "nnz"], n: int, m: int) -> Float[Tensor, "n m"]:
    return values.new_zeros(n * m).scatter_(0, places, values).view(n, m)
