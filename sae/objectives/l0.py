"""L0: the number of active latents, by JumpReLU's straight-through gradient (Rajamanoharan 2024, 2407.14435, eq. 9).

    L = L0 = sum_t sum_i H(h_ti - theta_i) / N,    or with a target    L = (L0 / target - 1)^2

Its gradient reaches the thresholds alone. That of the square is L0's own times 2 (L0 / target - 1) / target: above the
target it raises thresholds, below it lowers them. The bracket is that of the step before, so that micro-batches and
ranks add up.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.objectives import Objective, Sparsity, Step
from sae.selection import Selection


@Objective.register_subclass("l0")
@dataclass(frozen=True)
class L0(Sparsity):
    """Number of active latents."""

    weight: float = 1.0
    """Factor of the term. A fixed penalty (target_l0: 0) wants far less, about 1e-3."""
    target_l0: float = 32.0
    """L0 that the thresholds are steered to; 0 penalizes L0 itself."""

    def adapted(self, multiplier: Float[Tensor, ""], l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns the slope of the square in L0, by which L0's own gradient is multiplied."""
        return 2 * self.excess(l0) / self.target_l0 if self.target_l0 else multiplier

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError unless the coder has trained thresholds."""
        super().validate(d_sae, selection, n_blocks)
        if not selection.trains_thresholds:
            found = Selection.get_choice_name(type(selection))
            raise ConfigError(f"objectives.l0: needs the thresholds of selection jumprelu, not {found}; use l1 or tanh")

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns L0 of the micro-batch, weighted by its share of the batch."""
        run, coder = step.run, step.coder
        active = coder.spec.selection.active(run.kept.detach(), run.latents.ids, coder.per_latent())
        return active.sum() / step.n_tokens
