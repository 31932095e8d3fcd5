"""Optimizers: how gradients become a change of weights. One a file; `optim.kind` is its name.

What is common to all stays outside: the learning rate and its schedule, clipping, the norm of decoder rows, the average
(`sae/training/optim.py`). An optimizer decides what it remembers of a weight, in named tensors that a checkpoint holds,
and which latents a step changes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.base.plugins import Plugin, discover
from sae.kernels import kernel
from sae.kernels.update import Update


@dataclass(frozen=True)
class Optimizer(Plugin):
    """A way to update weights; as it stands, Adam with its two moments in the weight's own precision.

    Weights have one latent a row [m, d], or one number a latent [m]; biases of inputs and outputs are [d].
    """

    lazy: ClassVar[bool] = False
    """Whether a step leaves all of a latent as it is if nothing in the step has touched it."""

    def validate(self) -> None:
        """Raises ConfigError if it cannot be had here."""

    def bytes_of_state(self, width: int) -> float:
        """Returns what is remembered of one number of a float32 matrix of so many columns, to estimate memory by."""
        return 8.0

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns what is remembered of a weight before the first step: tensors with the weight's rows, by name."""
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def update(
        self,
        weight: Float[Tensor, "m *d"],
        gradient: Float[Tensor, "m *d"],
        state: dict[str, Tensor],
        update: Update,
        *,
        along: Float[Tensor, "m"] | None = None,
        unit: bool = False,
        half: Tensor | None = None,
        touched: Bool[Tensor, "m"] | None = None,
    ) -> None:
        """Takes a step in place, if it applies; else neither weight nor state change, and the host does not ask.

        The rest is what `adam` of `sae/kernels/reference.py` says. The gradient may be overwritten.
        """
        of_rows = {"along": along, "unit": unit, "half": half, "touched": touched}
        kernel("adam", weight)(weight, gradient, state["exp_avg"], state["exp_avg_sq"], update, **of_rows)


discover(__name__, __path__)
