"""Which tokens count: the one definition of the mask, for training, statistics and every arm of evaluation."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.text.packing import PADDING


@dataclass(frozen=True)
class MaskSpec:
    """Which tokens the coder was trained on; evaluation leaves all others alone in every arm."""

    special_ids: tuple[int, ...] = ()
    """Token ids that are masked: BOS, EOS, PAD, chat control."""
    skip_positions: int = 1
    """The first positions of every row, masked whatever token stands there: attention sinks live at position 0."""
    norm_limits: dict[str, float] = field(default_factory=dict)
    """By site name: tokens whose activation there has a larger Euclidean norm are masked."""
    next_token: bool = False
    """Whether positions without a next token are masked: they have no loss, hence no gradient of it."""


def token_mask(tokens: Int[Tensor, "rows context"], mask: MaskSpec) -> Bool[Tensor, "rows context"]:
    """Returns which positions count: no special token, no padding, not among the first `skip_positions` of the row.

    Nor do tokens that are context only (`sae.text.packing`), which come as numbers below that of padding.

    Where gradients of the next-token loss are asked for, a position without a next token does not count either.
    Together with `norm_mask` this is the only definition of the mask: training, statistics and every arm of evaluation.
    """
    special = torch.tensor(mask.special_ids, dtype=tokens.dtype, device=tokens.device)
    keep = ~torch.isin(tokens, special) & (tokens > PADDING)
    keep[:, : mask.skip_positions] = False
    if mask.next_token:
        keep[:, -1:] = False
        keep[:, :-1] &= tokens[:, 1:] != PADDING
    return keep


def norm_mask(activations: dict[str, Float[Tensor, "*shape d"]], mask: MaskSpec) -> Bool[Tensor, "*shape"]:
    """Returns which tokens are no outliers by norm at any site that has a limit; NaN and Inf are kept, to be found."""
    first = next(iter(activations.values()))
    keep = torch.ones(first.shape[:-1], dtype=torch.bool, device=first.device)
    for name, limit in mask.norm_limits.items():
        norms = activations[name].float().norm(dim=-1)
        keep &= (~(norms > limit) | norms.isinf()).to(keep.device)
    return keep


def next_token_mask(
    tokens: Int[Tensor, "rows context"], keep: Bool[Tensor, "rows context"]
) -> Bool[Tensor, "rows context_1"]:
    """Returns at which positions a next-token loss is counted: kept ones that have a next token."""
    return keep[:, :-1] & (tokens[:, 1:] != PADDING)
