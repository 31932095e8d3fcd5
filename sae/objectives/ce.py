"""ce: the model is to predict the text as well as it can with the coder spliced in (Braun 2024, arXiv 2405.12241).

    L = sum_t -log p(spliced)_t(next token) / N      (nats)

The language model is frozen. Batches are then whole rows of text. Unlike `kl`, the coder may come to predict better
than the model it explains, by other means.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.objectives import Objective, Step


@Objective.register_subclass("ce")
@dataclass(frozen=True)
class CE(Objective):
    """Next-token cross-entropy of the spliced model."""

    of_latents: ClassVar[bool | None] = False
    needs_rows: ClassVar[bool] = True

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the cross-entropy per token."""
        found = step.through_model()
        return torch.nn.functional.cross_entropy(found.patched, found.next_tokens, reduction="sum") / step.n_tokens
