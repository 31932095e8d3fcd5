"""AuxK: dead latents learn to explain what the living ones leave over (Gao 2024, arXiv 2406.04093, appendix A.2).

    e = stop_gradient(x - x^)        e^ = ReLU(TopK_kaux(h restricted to dead latents)) W_dec
    L = sum_t |e_t - e^_t|^2 / (N V_e)

V_e is the residual's variance at the previous step (the paper divides by the current batch's own; the previous one
makes micro-batches and ranks exact). No bias enters e^. The gradient reaches encoder and decoder of dead latents only,
and the term is exactly 0 while no latent is dead.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.kernels.codes import offsets_of
from sae.kernels.largest import top_ids
from sae.objectives import Objective, Step, weighted, zero
from sae.selection import Selection

ENTRIES_AT_ONCE = 2**24  # 64 MiB in float32: more pieces would have the host wait more often


@Objective.register_subclass("auxk")
@dataclass(frozen=True)
class AuxK(Objective):
    """The auxiliary loss that revives dead latents."""

    weight: float = 1 / 32
    k: int = 0
    """Dead latents used per token; 0 means the power of two nearest to d_out / 2."""

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError unless 0 <= k <= d_sae."""
        if not 0 <= self.k <= d_sae:
            name = Objective.get_choice_name(type(self))
            raise ConfigError(f"objectives.{name}.k: {self.k} is not between 0 and d_sae = {d_sae}")

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the normalized error of the dead latents' explanation of the residual."""
        return explained_by(step, step.dead.to(step.target), self.k)


def explained_by(step: Step, shares: Float[Tensor, "d_sae"], k: int) -> Float[Tensor, ""]:
    """Returns AuxK's loss for the latents whose share is positive, each latent's activation times its share."""
    chosen = (shares > 0).nonzero()[:, 0]
    if len(chosen) == 0 or len(step.target) == 0:
        return zero(step)
    k = min(k or nearest_power_of_two(step.target.shape[1] / 2), len(chosen))
    columns, positive = (torch.cat(found) for found in zip(*_largest(step.run.scores, chosen, k), strict=True))
    counts = positive.sum(1)
    offsets = offsets_of(counts)
    ids = chosen[columns[positive]]
    kept = step.coder.preactivations_at(step.run.y.detach(), offsets, ids)
    explained = step.coder.decoded(torch.relu(kept) * shares[ids], offsets, ids)
    residual = step.error(step.run.prediction).detach()
    return (residual - weighted(step.coder, explained)).square().sum() / (step.n_tokens * step.residual_variance)


def _largest(
    scores: Float[Tensor, "n d_sae"], chosen: Int[Tensor, "c"], k: int
) -> Iterator[tuple[Int[Tensor, "m k"], Bool[Tensor, "m k"]]]:
    """Yields, for some tokens at a time, the k largest of the chosen latents, as places among them, and which are > 0.

    All latents may be dead, and all their scores a second copy of what is the largest tensor of a step.
    """
    for part in scores.split(max(1, ENTRIES_AT_ONCE // len(chosen))):
        own = part[:, chosen]
        columns = top_ids(own, k)
        yield columns, own.gather(1, columns) > 0


def nearest_power_of_two(value: float) -> int:
    """Returns the power of two nearest to `value` on the logarithmic scale, at least 1."""
    return max(1, 2 ** round(torch.tensor(value).log2().item()))
