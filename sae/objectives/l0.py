"""L0: the number of active latents, by JumpReLU's straight-through gradient (Rajamanoharan 2024, 2407.14435, eq. 9).

    L = sum_t sum_i H(h_ti - theta_i) / N

Its gradient reaches the thresholds alone. `target_l0` adapts the weight, where others penalize (L0 / target - 1)^2: the
gradient has the same direction, and the sum over tokens stays one.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sae.errors import ConfigError
from sae.objectives import Objective, Sparsity, Step
from sae.selection import Selection, jumprelu


@Objective.register_subclass("l0")
@dataclass(frozen=True)
class L0(Sparsity):
    """Number of active latents."""

    weight: float = 1e-3

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError unless the coder has trained thresholds."""
        super().validate(d_sae, selection, n_blocks)
        if not isinstance(selection, jumprelu.JumpReLU):
            found = Selection.get_choice_name(type(selection))
            raise ConfigError(f"objectives.l0: needs the thresholds of selection jumprelu, not {found}; use l1 or tanh")

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns L0 of the micro-batch, weighted by its share of the batch."""
        rule, run = step.coder.spec.selection, step.run
        threshold = step.coder.per_latent()["threshold"][run.latents.ids]
        active = jumprelu.Heaviside.apply(run.kept.detach(), threshold, rule.bandwidth)  # type: ignore[attr-defined]
        return active.sum() / step.n_tokens
