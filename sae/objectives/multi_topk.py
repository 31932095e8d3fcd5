"""Multi-TopK: the coder is to reconstruct with more latents too, so that k can be changed later (2406.04093, A.5).

    L = sum_t |x_t - x^(4k)_t|^2 / (N V),   weight 1/8

Each token's 4k largest pre-activations, as selection compares them, are decoded, whatever rule chose its k; of a
cross-layer coder 4k of every block, or of all blocks together where they share a budget.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.kernels.codes import Support, by_rows
from sae.kernels.largest import top_ids
from sae.objectives import Objective, Step
from sae.selection import Selection


@Objective.register_subclass("multi_topk")
@dataclass(frozen=True)
class MultiTopK(Objective):
    """Squared error with a larger k, over the variance of the target."""

    weight: float = 1 / 8
    k: int = 0
    """Latents per token; 0 means four times the k of the selection."""

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError unless there is a k that fits."""
        found = Selection.get_choice_name(type(selection))
        if not self.k and selection.implied_l0 is None:
            raise ConfigError(f"objectives.multi_topk.k: 0 needs a selection with a k, not {found}; give a number")
        if selection.signed or selection.gated:
            raise ConfigError(f"objectives.multi_topk: the largest pre-activations are not the codes of {found}")
        if not 0 <= self.k <= d_sae:
            raise ConfigError(f"objectives.multi_topk.k: {self.k} is not between 0 and d_sae = {d_sae}")

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the FVU with the larger k, weighted by the micro-batch's share of the batch."""
        coder, run = step.coder, step.run
        if not len(step.target):
            return step.target.sum()
        wanted = self.k or 4 * (coder.spec.rule.implied_l0 or 0)

        def largest(_rule: Selection, scores: Tensor, *_: object) -> Support:
            return by_rows(top_ids(scores, min(wanted, scores.shape[1])))

        scores = run.scores * coder.decoder_norms().detach() if coder.spec.select_by_decoder_norm else run.scores
        offsets, ids = coder.support(scores, largest)
        values = torch.relu(coder.preactivations_at(run.y, offsets, ids))
        prediction = coder.decoded(values, offsets, ids) + run.rest
        return step.error(prediction).square().sum() / (step.n_tokens * step.variance)
