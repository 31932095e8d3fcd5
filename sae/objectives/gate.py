"""gate: what trains a gated coder's gates, beside `l1` (Rajamanoharan 2024, arXiv 2404.16014, equation 8, last term).

L = sum_t |x_t - (ReLU(pi_t) W_dec + b_dec)|^2 / (N V),   W_dec and b_dec held fixed
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.shard import moves_output
from sae.objectives import Objective, Step
from sae.parallel.ledger import Ledger
from sae.selection import Selection


@Objective.register_subclass("gate")
@dataclass(frozen=True)
class Gate(Objective):
    """Squared error of what the gates alone would reconstruct, over the variance of the target."""

    of_latents: ClassVar[bool | None] = False

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError unless the coder has gates."""
        if not selection.gated:
            found = Selection.get_choice_name(type(selection))
            raise ConfigError(f"objectives.gate: needs selection gated, not {found}")

    def moves(self, ledger: Ledger, coder: SparseCoder) -> None:
        """Writes down what the gates make of the output."""
        moves_output(ledger, coder.d_out, coder.dtype)

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the gates' FVU of the micro-batch, weighted by its share of the batch."""
        gates = step.run.latents.with_values(torch.relu(step.run.kept))
        return step.share(step.coder.fit(gates, step.run.rest.detach(), step.target, frozen=True)[1])
