"""Matching pursuit: latents are chosen one after the other, each the one that best explains what is left.

    r_0 = y     i = argmax_j <r_t, W_dec_j>     v = ReLU(<r_t, W_dec_i>)     a_i += v     r_{t+1} = r_t - v W_dec_i

(Costa 2025, arXiv 2506.03093, as SAELens implements it). A token is done when its support stays the same for a step or
its residual is short. The encoder is the decoder, so no pre-activation says by itself whether a latent fires; such
coders are loaded, not trained.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.encoders import Encoder
from sae.encoders.linear import Linear
from sae.kernels.codes import Support, where


@Encoder.register_subclass("matching_pursuit")
@dataclass(frozen=True)
class MatchingPursuit(Linear):
    """Chooses by the residual; its W_enc is a copy of W_dec and its b_enc 0."""

    pursues: ClassVar[bool] = True
    trainable: ClassVar[bool] = False

    def pursue(
        self, y: Float[Tensor, "n d"], decoder: Float[Tensor, "m d"], rule: Any
    ) -> tuple[Support, Float[Tensor, "nnz"]]:
        """Returns the support and its values; `rule`, the selection of the same name, says when a token is done."""
        acts, residual = y.new_zeros(len(y), len(decoder)), y.clone()
        live = torch.arange(len(y), device=y.device)  # the tokens that are not done
        for _ in range(rule.max_iterations or y.shape[1]):
            best = (residual[live] @ decoder.T).relu().max(dim=1).indices
            rows = decoder[best]
            values = (residual[live] * rows).sum(1).relu()
            before = acts[live, best] != 0
            acts[live, best] += values
            residual[live] -= values[:, None] * rows
            done = torch.zeros_like(before)
            if rule.stop_on_duplicate_support:
                done |= before | (values == 0)
            if rule.residual_threshold > 0:
                done |= residual[live].norm(dim=1) < rule.residual_threshold
            live = live[~done]
            if not len(live):
                break
        offsets, ids = where(acts != 0)
        return (offsets, ids), acts[acts != 0]
