"""kl: what the model predicts is to stay the same with the coder spliced in (Braun 2024, arXiv 2405.12241).

    L = sum_t KL(p(clean)_t || p(spliced)_t) / N      (nats)

The language model is frozen and the clean logits carry no gradient. Batches are then whole rows of text.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.objectives import Objective, Step


@Objective.register_subclass("kl")
@dataclass(frozen=True)
class KL(Objective):
    """Divergence of the spliced model's predictions from the model's own."""

    of_latents: ClassVar[bool | None] = False
    needs_rows: ClassVar[bool] = True

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the divergence per token."""
        found = step.through_model()
        p, q = found.clean.log_softmax(-1), found.patched.log_softmax(-1)
        return (p.exp() * (p - q)).sum() / step.n_tokens
