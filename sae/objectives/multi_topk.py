"""Multi-TopK: the coder is to reconstruct with more latents too, so that k can be changed later (2406.04093, A.5).

    L = sum_t |x_t - x^(4k)_t|^2 / (N V),   weight 1/8

Each token's 4k largest pre-activations, as selection compares them, are decoded, whatever rule chose its k; of a
cross-layer coder 4k of every block, or of all blocks together where they share a budget.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.coder import Choice, SparseCoder
from sae.coder.shard import best, moves_lists, moves_output
from sae.coder.spec import CoderSpec
from sae.kernels.codes import PAD, SparseLatents, by_rows
from sae.objectives import Objective, Step
from sae.parallel.ledger import Ledger
from sae.selection import Selection


@Objective.register_subclass("multi_topk")
@dataclass(frozen=True)
class MultiTopK(Objective):
    """Squared error with a larger k, over the variance of the target."""

    of_latents: ClassVar[bool | None] = False
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

    def entries(self, spec: CoderSpec) -> int:
        """Returns the larger k; of every block, where each chooses for itself."""
        groups = 1 if spec.budget == "shared" else spec.n_blocks
        return groups * self._k(spec)

    def _k(self, spec: CoderSpec) -> int:
        return self.k or 4 * (spec.rule.implied_l0 or 0)

    def choose(self, coder: SparseCoder, scores: Float[Tensor, "n d_sae"], begun: Any) -> Choice | None:
        """Returns the largest entries of every token."""
        compared = scores * coder.decoder_norms().detach() if coder.spec.select_by_decoder_norm else scores
        found = best(scores, compared, self._k(coder.whole), coder.rule_groups(), coder.cuts)
        known = found.known.masked_fill(~found.kept, PAD).flatten()
        return Choice(*by_rows(found.ids), known)

    def moves(self, ledger: Ledger, coder: SparseCoder) -> None:
        """Writes down the lists of the larger k, and what these latents make of the output."""
        compared = torch.float32 if coder.spec.select_by_decoder_norm else ledger.dtype
        for cut in coder.cuts if coder.shard else ():
            moves_lists(ledger, cut, self._k(coder.whole), compared)
        moves_output(ledger, coder.d_out, coder.dtype)

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the FVU with the larger k, weighted by the micro-batch's share of the batch."""
        if step.beside is None:
            return step.target.sum()  # no token is left
        offsets, ids, *_ = step.beside
        values = torch.relu(step.coder.preactivations_at(step.run.y, step.beside))
        codes = SparseLatents(offsets, ids, values, step.coder.spec.d_sae)
        return step.share(step.coder.fit(codes, step.run.rest, step.target)[1])
